use arrow::array::{Array, AsArray};
use arrow::datatypes::{DataType, Date32Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType};
use proptest::prelude::*;

use super::reference::{Cell, Verdict, judge};
use super::*;
use crate::source::Record;

const TELEMETRY: &str = include_str!("../../schemas/telemetry.json");
const EVERY_TYPE: &str = r#"{
    "type": "object",
    "properties": {
        "text": {"type": "string", "minLength": 2, "maxLength": 5},
        "count": {"type": ["integer", "null"], "exclusiveMinimum": 0},
        "small": {"type": "integer", "format": "int32"},
        "ratio": {"type": ["null", "number"], "minimum": -1.5, "exclusiveMaximum": 1.5},
        "flag": {"type": "boolean"},
        "at": {"type": "string", "format": "date-time"},
        "day": {"type": ["string", "null"], "format": "date"},
        "id": {"type": "string", "format": "uuid"},
        "color": {"enum": ["red", "green", null], "type": ["string", "null"]},
        "shade": {"enum": ["red", "green"], "type": ["string", "null"]},
        "level": {"enum": [1, 2.0, 30], "type": "integer"},
        "share": {"enum": [0.5, 1], "type": "number"},
        "yes": {"const": true, "type": "boolean"},
        "na\"me ü": {"type": "integer"}
    },
    "required": ["text"]
}"#;

/// Many keys, so that they are looked up another way.
fn wide() -> String {
    let properties: Vec<String> = (0..40).map(|i| format!("\"k{i}\":{{\"type\":\"integer\"}}")).collect();
    format!("{{\"type\":\"object\",\"properties\":{{{}}}}}", properties.join(","))
}

fn schema(text: &str) -> Arc<Schema> {
    Schema::parse(text).unwrap()
}

fn chunk_of<'a>(payloads: impl IntoIterator<Item = Option<&'a [u8]>>) -> Chunk {
    let mut chunk = Chunk { topic: "t".into(), ..Chunk::default() };
    for payload in payloads {
        let begin = chunk.data.len() as u32;
        chunk.data.extend_from_slice(b"key");
        chunk.data.extend_from_slice(payload.unwrap_or_default());
        let value_len = payload.map_or(Record::NONE, |p| p.len() as u32);
        chunk.records.push(Record { offset: 0, timestamp_ms: 0, begin, key_len: 3, value_len });
    }
    chunk
}

fn decode<'a>(schema: &Arc<Schema>, payloads: impl IntoIterator<Item = &'a str>) -> Decoded {
    Decoder::new(schema.clone()).decode(&chunk_of(payloads.into_iter().map(|p| Some(p.as_bytes()))))
}

fn row(batch: &RecordBatch, row: usize) -> Vec<Cell> {
    let cell = |column: &arrow::array::ArrayRef| match column.data_type() {
        _ if column.is_null(row) => Cell::Null,
        DataType::Boolean => Cell::Boolean(column.as_boolean().value(row)),
        DataType::Int32 => Cell::Integer(column.as_primitive::<Int32Type>().value(row).into()),
        DataType::Int64 => Cell::Integer(column.as_primitive::<Int64Type>().value(row)),
        DataType::Float64 => Cell::Number(column.as_primitive::<Float64Type>().value(row).to_bits()),
        DataType::Utf8 => Cell::Text(column.as_string::<i32>().value(row).to_owned()),
        DataType::Date32 => Cell::Days(column.as_primitive::<Date32Type>().value(row)),
        DataType::Timestamp(..) => Cell::Micros(column.as_primitive::<TimestampMicrosecondType>().value(row)),
        other => panic!("no column is of type {other}"),
    };
    batch.columns().iter().map(cell).collect()
}

/// Wherever they stand, with and without escapes.
#[test]
fn strings_of_every_length_are_copied_whole() {
    let schema = schema(r#"{"type":"object","properties":{"s":{"type":"string"},"n":{"type":"integer"}}}"#);
    let letters = "abcdefghijklmnopqrstuvwxyz0123456789äöü";
    let mut payloads = Vec::new();
    let mut expected = Vec::new();
    for length in 0..letters.chars().count() {
        let text: String = letters.chars().take(length).collect();
        for escape in [None, Some('\n'), Some('\0')] {
            let text: String = escape.into_iter().chain(text.chars()).collect();
            let quoted = serde_json::to_string(&text).unwrap();
            payloads.push(format!("{{\"s\":{quoted}}}"));
            payloads.push(format!("{{\"s\":{quoted},\"n\":1234567890123}}"));
            payloads.push(format!("{{ \"n\" : 1 , \"s\" : {quoted} }}"));
            expected.extend([text.clone(), text.clone(), text]);
        }
    }
    let decoded = decode(&schema, payloads.iter().map(String::as_str));
    assert_eq!(decoded.rejected, []);
    let found: Vec<&str> = decoded.batch.column(0).as_string::<i32>().iter().flatten().collect();
    assert_eq!(found, expected);
}

/// The one verdict on one payload.
fn verdict(schema: &Arc<Schema>, payload: &[u8]) -> Result<Vec<Cell>, (Reason, String, String)> {
    let decoded = Decoder::new(schema.clone()).decode(&chunk_of([Some(payload)]));
    match &decoded.rejected[..] {
        [] => Ok(row(&decoded.batch, 0)),
        [r] => Err((r.reason, r.path.to_string(), r.message.to_string())),
        _ => panic!("one record, several rejections"),
    }
}

#[test]
fn telemetry_becomes_columns() {
    let schema = schema(TELEMETRY);
    let payload = r#"{"device_id":"device-00042","event_timestamp":"2026-11-20T12:00:00.123Z","battery_level":87.5,"signal_strength":-71,"latitude":52.520008,"longitude":13.404954,"duration_ms":1234,"status":"online"}"#;
    let expected = vec![
        Cell::Text("device-00042".to_owned()),
        Cell::Micros("2026-11-20T12:00:00.123Z".parse::<jiff::Timestamp>().unwrap().as_microsecond()),
        Cell::Number(87.5f64.to_bits()),
        Cell::Number((-71f64).to_bits()),
        Cell::Number(52.520008f64.to_bits()),
        Cell::Number(13.404954f64.to_bits()),
        Cell::Integer(1234),
        Cell::Text("online".to_owned()),
    ];
    assert_eq!(verdict(&schema, payload.as_bytes()), Ok(expected));
    let sparse = r#" { "event_timestamp" : "1970-01-01T01:00:00+01:00" , "\u0064evice_id" : "\ud83d\ude00\n" , "status" : null } "#;
    let mut expected = vec![Cell::Null; 8];
    expected[0] = Cell::Text("😀\n".to_owned());
    expected[1] = Cell::Micros(0);
    assert_eq!(verdict(&schema, sparse.as_bytes()), Ok(expected));
}

#[test]
fn every_reason_has_its_path_and_message() {
    use Reason::*;
    let open = schema(EVERY_TYPE);
    let with = |member: &str| format!(r#"{{"text":"ab",{member}}}"#);
    let cases: Vec<(String, Reason, &str, &str)> = vec![
        (String::new(), Empty, "$", "empty"),
        (" \t\r\n".to_owned(), Empty, "$", "empty"),
        ("[1, 2]".to_owned(), NotAnObject, "$", "found [1, 2]"),
        ("null".to_owned(), NotAnObject, "$", "found null"),
        ("{}".to_owned(), MissingField, "$.text", "required"),
        (with(r#""count":1"#) + "x", MalformedJson, "$", "found 'x' at byte 23"),
        (with(r#""count":1"#) + "{}", MalformedJson, "$", "nothing after the document"),
        (with(r#""count":1,"#), MalformedJson, "$", "a key in quotes"),
        (with(r#""count":"#), MalformedJson, "$", ""),
        ("\0\0\0\0\u{1}{}".to_owned(), MalformedJson, "$", "schema registry"),
        ("\u{feff}{}".to_owned(), MalformedJson, "$", "byte order mark"),
        (r#"{"text":"#.to_owned(), MalformedJson, "$", "the document ends at byte 8"),
        // What is wrong with it as JSON comes first, wherever it stands.
        (r#"{"text":5,"flag":tru}"#.to_owned(), MalformedJson, "$", "true"),
        (with(r#""count":0,"text":"ab""#), DuplicateKey, "$.text", "\"text\" is given twice"),
        (with(r#""\u0074ext":"ab""#), DuplicateKey, "$.text", "twice"),
        (with(r#""other":1,"o\u0074her":1"#), DuplicateKey, "$.other", "twice"),
        (with(r#""count":1,"count":1"#), DuplicateKey, "$.count", "twice"),
        (with(r#""count":null,"count":null"#), DuplicateKey, "$.count", "twice"),
        (with(r#""text":"ab","text":"ab""#), DuplicateKey, "$.text", "twice"),
        (with(r#""count":"1""#), WrongType, "$.count", "found \"1\"; allowed is an integer from 1, or null"),
        (with(r#""count":5.5"#), WrongType, "$.count", "found 5.5"),
        (with(r#""count":true"#), WrongType, "$.count", "found true"),
        (with(r#""count":{"a":[1]}"#), WrongType, "$.count", r#"found {"a":[1]}"#),
        (with(r#""count":[]"#), WrongType, "$.count", "found []"),
        (with(r#""flag":0"#), WrongType, "$.flag", "allowed is true or false"),
        (with(r#""flag":null"#), WrongType, "$.flag", "found null"),
        (with(r#""shade":null"#), WrongType, "$.shade", "found null"),
        (with(r#""ratio":"0""#), WrongType, "$.ratio", "a number from -1.5"),
        (with(r#""at":1700000000"#), WrongType, "$.at", "RFC 3339"),
        (r#"{"text":null}"#.to_owned(), WrongType, "$.text", "found null"),
        (with(r#""na\"me ü":"x""#), WrongType, "$['na\"me ü']", "found \"x\""),
        (with(r#""count":9223372036854775808"#), NumberOutOfRange, "$.count", "found 9223372036854775808"),
        (with(r#""count":1e400"#), NumberOutOfRange, "$.count", "1e400"),
        (with(r#""small":2147483648"#), NumberOutOfRange, "$.small", "a 32-bit integer"),
        (with(r#""small":-2147483649"#), NumberOutOfRange, "$.small", ""),
        (with(r#""ratio":-1e400"#), NumberOutOfRange, "$.ratio", "-1e400"),
        (with(r#""count":0"#), OutOfRange, "$.count", "found 0; allowed is an integer from 1"),
        (with(r#""count":-0.0"#), OutOfRange, "$.count", "found -0.0"),
        (with(r#""ratio":1.5"#), OutOfRange, "$.ratio", "found 1.5"),
        (with(r#""ratio":-1.51"#), OutOfRange, "$.ratio", "-1.51"),
        (with(r#""color":"blue""#), NotInEnum, "$.color", r#"one of "green", "red", or null"#),
        (with(r#""level":3"#), NotInEnum, "$.level", "one of 1, 2, 30"),
        (with(r#""share":0.25"#), NotInEnum, "$.share", "one of 0.5, 1.0"),
        (with(r#""yes":false"#), NotInEnum, "$.yes", "one of true"),
        (with(r#""at":"2026-02-30T00:00:00Z""#), BadFormat, "$.at", "2026-02-30"),
        (with(r#""at":"2026-02-20T00:00:00""#), BadFormat, "$.at", "with an offset"),
        (with(r#""day":"2026-2-20""#), BadFormat, "$.day", "RFC 3339 date"),
        (with(r#""id":"123""#), BadFormat, "$.id", "a UUID"),
        (r#"{"text":"a"}"#.to_owned(), BadLength, "$.text", "2 to 5 characters"),
        (r#"{"text":"ü"}"#.to_owned(), BadLength, "$.text", "found \"ü\""),
        (r#"{"text":"abcdef"}"#.to_owned(), BadLength, "$.text", ""),
    ];
    for (payload, reason, path, message) in &cases {
        let (found_reason, found_path, found_message) = verdict(&open, payload.as_bytes()).expect_err(payload);
        assert_eq!((found_reason, found_path.as_str()), (*reason, *path), "{payload}: {found_message}");
        assert!(found_message.contains(message), "{payload}: {found_message}");
    }
    let invalid = verdict(&open, b"{\"text\":\"ab\",\"x\":\"\xff\"}").unwrap_err();
    assert_eq!((invalid.0, invalid.2.as_str()), (InvalidUtf8, "byte 18 is not valid UTF-8"));
    let null = Decoder::new(open.clone()).decode(&chunk_of([None]));
    assert_eq!(null.rejected[0].reason, NullValue);

    let closed = schema(r#"{"type":"object","properties":{"a":{"type":"integer"}},"additionalProperties":false}"#);
    let unknown = verdict(&closed, br#"{"a":1,"b c":2}"#).unwrap_err();
    assert_eq!((unknown.0, unknown.1.as_str()), (UnknownField, "$['b c']"));
    assert_eq!(verdict(&closed, br#"{"b":1,"b":2}"#).unwrap_err().0, DuplicateKey);
}

#[test]
fn limits_include_their_ends() {
    let schema = schema(EVERY_TYPE);
    for member in [
        r#""count":9223372036854775807"#,
        r#""count":1.0"#,
        r#""count":1e2"#,
        r#""small":-2147483648"#,
        r#""ratio":-1.5"#,
        r#""ratio":1.4999999999999998"#,
        r#""ratio":1e-400"#,
        r#""level":2"#,
        r#""share":1"#,
        r#""color":null"#,
        r#""day":"0000-02-29""#,
        r#""other":1e400"#,
        r#""other":{"a":1,"a":2}"#,
    ] {
        let payload = format!(r#"{{"text":"äöüßé",{member}}}"#);
        assert!(verdict(&schema, payload.as_bytes()).is_ok(), "{payload}");
    }
}

#[test]
fn a_refused_record_leaves_no_trace_in_the_columns() {
    let schema = schema(EVERY_TYPE);
    let valid = r#"{"text":"ab","count":7,"ratio":null,"flag":true,"color":"red","day":"1970-01-02"}"#;
    let invalid = [
        r#"{"text":"zz","count":8,"small":8,"ratio":1,"flag":false,"at":"2026-01-01T00:00:00Z","id":"no"}"#,
        r#"{"flag":true,"color":null,"count":null,"text":"zz""#,
        r#"{"count":9}"#,
        r#"{"text":"zz","count":8,"text":"zz"}"#,
    ];
    let mut payloads = Vec::new();
    for i in 0..200 {
        payloads.push(valid);
        payloads.extend(&invalid[..i % 5]);
    }
    let decoded = decode(&schema, payloads.iter().copied());
    assert_eq!(decoded.batch.num_rows(), 200);
    let alone = row(&decode(&schema, [valid]).batch, 0);
    for i in 0..200 {
        assert_eq!(row(&decoded.batch, i), alone);
        assert_eq!(payloads[decoded.records[i] as usize], valid);
    }
    assert_eq!(decoded.records.len() + decoded.rejected.len(), payloads.len());
    assert!(decoded.rejected.iter().all(|r| payloads[r.record as usize] != valid));
}

#[test]
fn depth_is_limited_without_using_the_stack() {
    let schema = schema(r#"{"type":"object","properties":{"a":{"type":"integer"}}}"#);
    let nested = |key: &str, open: &str, close: &str, depth: usize| {
        format!("{{\"{key}\":{}1{}}}", open.repeat(depth), close.repeat(depth))
    };
    for (open, close) in [("[", "]"), ("{\"x\":", "}")] {
        assert!(verdict(&schema, nested("b", open, close, 127).as_bytes()).is_ok());
        assert_eq!(verdict(&schema, nested("a", open, close, 127).as_bytes()).unwrap_err().0, Reason::WrongType);
        for depth in [128, 10_000, 1_000_000] {
            for key in ["a", "b"] {
                assert_eq!(
                    verdict(&schema, nested(key, open, close, depth).as_bytes()).unwrap_err().0,
                    Reason::TooDeep
                );
            }
        }
        assert_eq!(verdict(&schema, open.repeat(1_000_000).as_bytes()).unwrap_err().0, Reason::TooDeep);
    }
}

#[test]
fn large_payloads_take_linear_time() {
    let schema = schema(EVERY_TYPE);
    let started = std::time::Instant::now();
    let keys: String = (0..100_000).map(|i| format!("\"k{i}\":{i},")).collect();
    assert!(verdict(&schema, format!("{{{keys}\"text\":\"ab\"}}").as_bytes()).is_ok());
    assert_eq!(verdict(&schema, format!("{{{keys}\"k5\":1}}").as_bytes()).unwrap_err().0, Reason::DuplicateKey);
    assert_eq!(verdict(&schema, format!("{{{keys}\"k99999\":1}}").as_bytes()).unwrap_err().0, Reason::DuplicateKey);
    let digits = "1".repeat(1_000_000);
    for payload in [
        format!(r#"{{"text":"{digits}"}}"#),
        format!(r#"{{"text":"{}"}}"#, "\\u0061".repeat(200_000)),
        format!(r#"{{"text":"ab","count":{digits}}}"#),
        format!(r#"{{"text":"ab","count":0.{digits}e5}}"#),
        format!(r#"{{"text":"ab","ratio":{digits}}}"#),
        format!(r#"{{"text":"ab","at":"{digits}"}}"#),
        format!(r#"{{"text":"ab","{digits}":1,"{digits}":1}}"#),
    ] {
        let (_, path, message) = verdict(&schema, payload.as_bytes()).unwrap_err();
        assert!(path.len() < 200 && message.len() < 400, "{path} {message}");
    }
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}

#[test]
fn members_may_come_in_any_order() {
    let schema = schema(EVERY_TYPE);
    let members = [r#""text":"ab""#, r#""count":7"#, r#""flag":true"#, r#""unknown":[{}]"#, r#""color":"red""#];
    let mut payloads = Vec::new();
    for i in 0..5 * 5 * 5 {
        let mut order = members.to_vec();
        order.rotate_left(i % 5);
        order.swap(i / 5 % 5, i / 25);
        payloads.push(format!("{{{}}}", order.join(",")));
    }
    let decoded = decode(&schema, payloads.iter().map(String::as_str));
    assert!(decoded.rejected.is_empty(), "{:?}", decoded.rejected);
    assert!((1..decoded.batch.num_rows()).all(|i| row(&decoded.batch, i) == row(&decoded.batch, 0)));
}

#[test]
fn a_wide_schema_finds_its_keys() {
    let schema = schema(&wide());
    let payload = |step: usize| {
        let members: Vec<String> = (0..40).map(|i| i * step % 41).map(|i| format!("\"k{i}\":{i}")).collect();
        format!("{{{}}}", members.join(","))
    };
    for step in [1, 3, 7, 40] {
        let found = verdict(&schema, payload(step).as_bytes()).unwrap();
        // i × step never meets one of the numbers below 41; `k40` is no field.
        let skipped = (0..40).filter(|i| found[*i] == Cell::Null).count();
        assert!(skipped <= 1, "{skipped}");
        assert!((0..40).all(|i| matches!(found[i], Cell::Null) || found[i] == Cell::Integer(i as i64)));
    }
}

/// Cases in the manner of the JSON parsing test suite (github.com/nst/JSONTestSuite), each as a document, as an
/// unknown member's value and as a known one's.
#[test]
fn json_is_judged_as_rfc_8259_says() {
    let schema = schema(r#"{"type":"object","properties":{"a":{"type":"boolean"}}}"#);
    let accepted = [
        "[[]   ]",
        "[\"\"]",
        "[]",
        "[\"a\"]",
        "[false]",
        "[null, 1, \"1\", {}]",
        "[null]",
        "[1\n]",
        " [1]",
        "[1,null,null,null,2]",
        "[2] ",
        "[123e65]",
        "[0e+1]",
        "[0e1]",
        "[ 4]",
        "[-0.000000000000000000000000000000000000001]",
        "[20e1]",
        "[-0]",
        "[-123]",
        "[-1]",
        "[1E22]",
        "[1E-2]",
        "[1E+2]",
        "[123e45]",
        "[123.456e78]",
        "[1e-2]",
        "[1e+2]",
        "[123]",
        "[123.456789]",
        "{\"asd\":\"sdf\", \"dfg\":\"fgh\"}",
        "{}",
        "{\"\":0}",
        "{\"foo\\u0000bar\": 42}",
        "{\"x\":[]}",
        "{\n\"a\": \"b\"\n}",
        "[\"\\u0060\\u012a\\u12AB\"]",
        "[\"\\uD801\\udc37\"]",
        "[\"\\ud83d\\ude39\\ud83d\\udc8d\"]",
        "[\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"]",
        "[\"\\\\u0000\"]",
        "[\"\\\"\"]",
        "[\"a/*b*/c/*d//e\"]",
        "[\"\\\\a\"]",
        "[\"\\u0012\"]",
        "[\"\\uFFFF\"]",
        "[ \"asd\"]",
        "[\"\u{10FFFF}\"]",
        "[\"\\u0000\"]",
        "[\"\u{2028}\"]",
        "[\"\u{7f}\"]",
        "[\"\u{feff}\"]",
        "[\"\\uDBFF\\uDFFE\"]",
        "false",
        "42",
        "-0.1",
        "null",
        "\"asd\"",
        "true",
        "\"\"",
        "[\"a\"]\n",
        "\t[true]\r\n ",
        "[1e400]",
        "[-1e+9999]",
        "[123123123123123123123123123123]",
        "[0.4e006699999999999999999999]",
    ];
    let refused = [
        "[1 true]",
        "[a\u{e9}]",
        "[\"\": 1]",
        "[\"\"],",
        "[,1]",
        "[1,,2]",
        "[\"x\",,]",
        "[\"x\"]]",
        "[\"\",]",
        "[\"x\"",
        "[x",
        "[3[4]]",
        "[1:2]",
        "[,]",
        "[-]",
        "[   , \"\"]",
        "[\"a\",\n4\n,1,",
        "[1,]",
        "[1,,]",
        "[\"\u{b}a\"\\f]",
        "[*]",
        "[\"\"",
        "[1,",
        "[1,\n1\n,1",
        "[{}",
        "[fals]",
        "[nul]",
        "[tru]",
        "[++1234]",
        "[+1]",
        "[+Inf]",
        "[-01]",
        "[-1.0.]",
        "[-2.]",
        "[-NaN]",
        "[.-1]",
        "[.2e-3]",
        "[0.1.2]",
        "[0.3e+]",
        "[0.3e]",
        "[0.e1]",
        "[0E+]",
        "[0E]",
        "[0e]",
        "[1.0e+]",
        "[1.0e-]",
        "[1 000.0]",
        "[1eE2]",
        "[2.e+3]",
        "[2.e-3]",
        "[2.e3]",
        "[9.e+]",
        "[Inf]",
        "[NaN]",
        "[\u{ff11}]",
        "[1+2]",
        "[0x1]",
        "[0x42]",
        "[Infinity]",
        "[0e+-1]",
        "[-123.123foo]",
        "[123\u{e5}]",
        "[-Infinity]",
        "[-foo]",
        "[- 1]",
        "[-012]",
        "[-.123]",
        "[-1x]",
        "[1ea]",
        "[1e1\u{e5}]",
        "[1.]",
        "[.123]",
        "[1.2a-3]",
        "[1.8011670033376514H-308]",
        "[012]",
        "[\"x\", truth]",
        "{[: \"x\"}",
        "{\"x\", null}",
        "{\"x\"::\"b\"}",
        "{\u{1f1e8}}",
        "{\"a\":\"a\" 123}",
        "{key: 'value'}",
        "{\"a\" b}",
        "{:\"b\"}",
        "{\"a\" \"b\"}",
        "{\"a\":",
        "{\"a\"",
        "{1:1}",
        "{9999E9999:1}",
        "{null:null,null:null}",
        "{\"id\":0,,,,,}",
        "{'a':0}",
        "{\"id\":0,}",
        "{\"a\":\"b\"}/**/",
        "{\"a\":\"b\"}//",
        "{\"a\":\"b\",,\"c\":\"d\"}",
        "{a: \"b\"}",
        "{\"a\":\"a",
        "{ \"foo\" : \"bar\", \"a\" }",
        "{\"a\":\"b\"}#",
        " {",
        "[\"\\uD800\\\"]",
        "[\"\\uD800\\u\"]",
        "[\"\\uD800\\u1\"]",
        "[\"\\uD800\\u1x\"]",
        "[\u{e9}]",
        "[\"\\\u{0}\"]",
        "[\"\\x00\"]",
        "[\"\\\\\\\"]",
        "[\"\\\t\"]",
        "[\"\\\u{1f300}\"]",
        "[\"\\\"]",
        "[\"\\u00A\"]",
        "[\"\\uD834\\uDd\"]",
        "[\"\\uD800\\uD800\\x\"]",
        "[\"\\a\"]",
        "[\"\\uqqqq\"]",
        "[\\u0020\"asd\"]",
        "[\\n]",
        "\"",
        "['single quote']",
        "abc",
        "[\"\\",
        "[\"a\u{0}a\"]",
        "[\"new\nline\"]",
        "[\"\t\"]",
        "\"\\UA66D\"",
        "\"\"x",
        "<.>",
        "[<null>]",
        "[1]x",
        "[1]]",
        "[\"asd]",
        "a\u{e5}",
        "[True]",
        "1]",
        "{\"x\": true,",
        "[][]",
        "]",
        "\u{feff}{}",
        "\u{e5}",
        "[",
        "2@",
        "{}}",
        "{\"\":",
        "{\"a\":/*comment*/\"b\"}",
        "{\"a\": true} \"x\"",
        "['",
        "[,",
        "[{",
        "[\"a",
        "{",
        "{]",
        "{,",
        "{[",
        "{\"a",
        "{'a'",
        "[\"\\{[\"\\{[\"\\{[\"\\{",
        "*",
        "#",
        "[\\u000A\"\"]",
        "[1",
        "[ false, nul",
        "\u{2060}",
        "[\u{c}]",
        "[\u{a0}]",
        "\u{1}",
        "[\"\\u12\u{fc}4\"]",
        "00",
        "-",
        "1.e1",
        "--1",
        "1e",
        "tru",
        "nulll",
        "truefalse",
        // The grammar lets these pass; no UTF-8 text can hold them.
        "[\"\\uD800\"]",
        "[\"\\uDc00\"]",
        "[\"\\uD800\\uD800\"]",
        "[\"\\ud800abc\"]",
        "[\"\\uDd1e\\uD834\"]",
        "[\"\\uD800\\n\"]",
    ];
    for text in accepted {
        if let Err((reason, _, message)) = verdict(&schema, text.as_bytes()) {
            let not_for_the_schema = matches!(reason, Reason::NotAnObject | Reason::WrongType);
            assert!(not_for_the_schema, "{text}: {reason:?} {message}");
        }
        assert!(verdict(&schema, format!("{{\"b\":{text}}}").as_bytes()).is_ok(), "{text}");
        if let Err((reason, _, message)) = verdict(&schema, format!("{{\"a\":{text}}}").as_bytes()) {
            assert_eq!(reason, Reason::WrongType, "{text}: {message}");
        }
    }
    for text in refused {
        for payload in [text.to_owned(), format!("{{\"b\":{text}}}"), format!("{{\"a\":{text}}}")] {
            // A stray brace may close the object around it: then what follows is too much.
            let (reason, _, message) = verdict(&schema, payload.as_bytes()).expect_err(&payload);
            assert_eq!(reason, Reason::MalformedJson, "{payload}: {message}");
        }
    }
    for bytes in
        [&b"[\"\xff\"]"[..], b"{\"\xed\xa0\x80\":1}", b"[\"\xc0\xaf\"]", b"\xff\xfe[\0]\0", b"{\"a\":true}\x80"]
    {
        assert_eq!(verdict(&schema, bytes).unwrap_err().0, Reason::InvalidUtf8);
    }
}

fn agree(schema: &Arc<Schema>, payload: &[u8]) -> Result<(), TestCaseError> {
    let found = verdict(schema, payload);
    let shown = String::from_utf8_lossy(payload);
    match judge(schema, payload) {
        Verdict::Row(row) => prop_assert_eq!(found, Ok(row), "{}", shown),
        Verdict::Refused(reason, path) => {
            let found = found.map_err(|(reason, path, _)| (reason, path));
            prop_assert_eq!(found, Err((reason, path)), "{}", shown);
        }
        Verdict::Unknown => {}
    }
    Ok(())
}

/// JSON texts of values, right and wrong ones, for any member.
fn value() -> impl Strategy<Value = String> {
    let text = |s: String| serde_json::Value::from(s).to_string();
    prop_oneof![
        any::<i64>().prop_map(|n| n.to_string()),
        (-200i64..200).prop_map(|n| n.to_string()),
        any::<f64>().prop_filter("finite", |f| f.is_finite()).prop_map(|f| serde_json::Value::from(f).to_string()),
        (-2.0f64..2.0).prop_map(|f| f.to_string()),
        (any::<i32>(), -12i32..12).prop_map(|(n, e)| format!("{n}e{e}")),
        (any::<i32>(), 0u32..99, 0i32..4).prop_map(|(n, f, e)| format!("{n}.{f:02}E+{e}")),
        (-1i64..4_000_000_000_000_000).prop_map(|us| match jiff::Timestamp::from_microsecond(us) {
            Ok(t) => format!("\"{t}\""),
            Err(_) => "0".to_owned(),
        }),
        (0u32..2100, 0u32..14, 0u32..33, 0u32..25, 58u32..61, -14i32..15)
            .prop_map(|(y, m, d, h, s, o)| format!("\"{y:04}-{m:02}-{d:02}T{h:02}:59:{s:02}.25{o:+03}:00\"")),
        (1990u32..2030, 0u32..14, 0u32..33).prop_map(|(y, m, d)| format!("\"{y:04}-{m:02}-{d:02}\"")),
        any::<u128>().prop_map(|n| format!("\"{}\"", uuid::Uuid::from_u128(n))),
        "[ -~äü€😀\\n\"]{0,8}".prop_map(text),
        any::<String>().prop_map(text),
        proptest::collection::vec(any::<u16>(), 0..4)
            .prop_map(|units| format!("\"{}\"", units.iter().map(|u| format!("\\u{u:04x}")).collect::<String>())),
        proptest::sample::select(vec![
            "null",
            "true",
            "false",
            "[]",
            "{}",
            "[1,{\"a\":null}]",
            "\"red\"",
            "\"green\"",
            "1",
            "2",
            "0.5",
            "\"\"",
            "-0",
            "-0.0",
            "1.0",
            "\"online\"",
            "\"ab\"",
            "5.5"
        ])
        .prop_map(str::to_owned),
    ]
}

fn document() -> impl Strategy<Value = String> {
    let key = proptest::sample::select(vec![
        "\"text\"",
        "\"count\"",
        "\"small\"",
        "\"ratio\"",
        "\"flag\"",
        "\"at\"",
        "\"day\"",
        "\"id\"",
        "\"color\"",
        "\"shade\"",
        "\"level\"",
        "\"share\"",
        "\"yes\"",
        "\"na\\\"me ü\"",
        "\"na\\u0022me \\u00fc\"",
        "\"other\"",
        "\"\"",
        "\"te\\u0078t\"",
        "\"device_id\"",
        "\"event_timestamp\"",
        "\"battery_level\"",
        "\"duration_ms\"",
        "\"status\"",
    ]);
    let space = || proptest::sample::select(vec!["", "", "", " ", "\n\t", "\r\n  "]);
    let member = (space(), key, space(), space(), value(), space())
        .prop_map(|(a, key, b, c, value, d)| format!("{a}{key}{b}:{c}{value}{d}"));
    let required = proptest::bool::weighted(0.8);
    (proptest::collection::vec(member, 0..6), required, any::<prop::sample::Index>()).prop_map(
        |(mut members, required, at)| {
            if required {
                members.insert(at.index(members.len() + 1), r#""text":"abc""#.to_owned());
            }
            format!("{{{}}}", members.join(","))
        },
    )
}

/// Byte edits: replace, remove, insert, double a part.
fn mutate(mut bytes: Vec<u8>, edits: &[(u8, prop::sample::Index, u8)]) -> Vec<u8> {
    const INTERESTING: &[u8] = b"{}[]\",:\\ 0123456789eE+-.tfnu\0\x1f\x7f\x80\xc3\xbc\xff\n";
    for (kind, at, with) in edits {
        let at = at.index(bytes.len() + 1);
        let with = if *with < 200 { INTERESTING[*with as usize % INTERESTING.len()] } else { *with };
        match kind % 4 {
            0 if at < bytes.len() => bytes[at] = with,
            1 if at < bytes.len() => {
                bytes.remove(at);
            }
            2 => bytes.insert(at, with),
            3 => {
                let part = bytes[at..(at + usize::from(with)).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
            _ => {}
        }
    }
    bytes
}

fn edits(at_most: usize) -> impl Strategy<Value = Vec<(u8, prop::sample::Index, u8)>> {
    proptest::collection::vec(any::<(u8, prop::sample::Index, u8)>(), 0..at_most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn documents_are_judged_as_by_the_reference(text in document()) {
        agree(&schema(EVERY_TYPE), text.as_bytes())?;
    }

    #[test]
    fn mutated_documents_are_judged_as_by_the_reference(text in document(), edits in edits(5)) {
        agree(&schema(EVERY_TYPE), &mutate(text.into_bytes(), &edits))?;
    }

    #[test]
    fn mutated_telemetry_is_judged_as_by_the_reference(edits in edits(4)) {
        let text = r#"{"device_id":"device-00042","event_timestamp":"2026-11-20T12:00:00.123Z","battery_level":87.5,"signal_strength":-71,"latitude":52.520008,"longitude":13.404954,"duration_ms":1234,"status":"online"}"#;
        agree(&schema(TELEMETRY), &mutate(text.into(), &edits))?;
    }

    #[test]
    fn any_bytes_are_judged_as_by_the_reference(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        agree(&schema(EVERY_TYPE), &bytes)?;
    }

    /// One decoder, many records: what one record leaves behind does not show in the next.
    #[test]
    fn a_chunk_is_judged_record_by_record(
        payloads in proptest::collection::vec((document(), edits(2)), 0..20)
    ) {
        let schema = schema(EVERY_TYPE);
        let payloads: Vec<Vec<u8>> = payloads.into_iter().map(|(d, e)| mutate(d.into_bytes(), &e)).collect();
        let chunk = chunk_of(payloads.iter().map(|p| Some(&p[..])));
        let mut decoder = Decoder::new(schema.clone());
        for _ in 0..2 {
            let decoded = decoder.decode(&chunk);
            prop_assert_eq!(decoded.records.len(), decoded.batch.num_rows());
            prop_assert_eq!(decoded.records.len() + decoded.rejected.len(), payloads.len());
            for (i, record) in decoded.records.iter().enumerate() {
                prop_assert_eq!(Ok(row(&decoded.batch, i)), verdict(&schema, &payloads[*record as usize]));
            }
            for r in &decoded.rejected {
                let alone = verdict(&schema, &payloads[r.record as usize]);
                prop_assert_eq!(Err((r.reason, r.path.to_string(), r.message.to_string())), alone);
            }
        }
    }
}
