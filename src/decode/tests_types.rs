//! Nested and rarer types: values to the last digit, paths, what a refused record leaves behind, and agreement with the
//! `jsonschema` crate on schemas and documents made at random.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type, Time64MicrosecondType,
    TimestampMicrosecondType,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::schema::Validator;
use crate::source::Record;

fn chunk_of<'a>(payloads: impl IntoIterator<Item = &'a [u8]>) -> Chunk {
    let mut chunk = Chunk { topic: "t".into(), ..Chunk::default() };
    for payload in payloads {
        let begin = chunk.data.len() as u32;
        chunk.data.extend_from_slice(payload);
        let value_len = payload.len() as u32;
        chunk.records.push(Record { offset: 0, timestamp_ms: 0, begin, key_len: Record::NONE, value_len });
    }
    chunk
}

fn schema(text: &str) -> Arc<Schema> {
    Schema::parse(text).unwrap_or_else(|problems| panic!("{text}: {}", problems.join("\n")))
}

fn decode<'a>(schema: &Arc<Schema>, payloads: impl IntoIterator<Item = &'a str>) -> Decoded {
    Decoder::new(schema.clone()).decode(&chunk_of(payloads.into_iter().map(str::as_bytes)))
}

/// What a column holds in a row, so that nothing of it is lost: numbers and times as their digits.
fn shown(array: &ArrayRef, row: usize) -> Value {
    if array.is_null(row) {
        return Value::Null;
    }
    match array.data_type() {
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int32 => array.as_primitive::<Int32Type>().value(row).into(),
        DataType::Int64 => array.as_primitive::<Int64Type>().value(row).into(),
        DataType::Float32 => format!("{:?}", array.as_primitive::<Float32Type>().value(row)).into(),
        DataType::Float64 => format!("{:?}", array.as_primitive::<Float64Type>().value(row)).into(),
        DataType::Decimal128(..) => array.as_primitive::<Decimal128Type>().value_as_string(row).into(),
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::Binary => array.as_binary::<i32>().value(row).into(),
        DataType::Date32 => array.as_primitive::<Date32Type>().value(row).into(),
        DataType::Time64(_) => array.as_primitive::<Time64MicrosecondType>().value(row).into(),
        DataType::Timestamp(..) => array.as_primitive::<TimestampMicrosecondType>().value(row).into(),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            Value::Object(fields.iter().zip(columns).map(|(f, c)| (f.name().clone(), shown(c, row))).collect())
        }
        DataType::List(_) => {
            let items = array.as_list::<i32>().value(row);
            Value::Array((0..items.len()).map(|i| shown(&items, i)).collect())
        }
        DataType::Map(..) => {
            let entries = array.as_map().value(row);
            let (keys, values) = (entries.column(0), entries.column(1));
            let entry = |i| (keys.as_string::<i32>().value(i).to_owned(), shown(values, i));
            Value::Object((0..entries.len()).map(entry).collect())
        }
        other => panic!("no column is of type {other}"),
    }
}

fn row(batch: &RecordBatch, row: usize) -> Value {
    let schema = batch.schema();
    Value::Object(schema.fields().iter().zip(batch.columns()).map(|(f, c)| (f.name().clone(), shown(c, row))).collect())
}

fn verdict(schema: &Arc<Schema>, payload: &str) -> Result<Value, (Reason, String, String)> {
    let decoded = decode(schema, [payload]);
    match decoded.rejected.first() {
        None => Ok(row(&decoded.batch, 0)),
        Some(r) => Err((r.reason, r.path.to_string(), r.message.to_string())),
    }
}

const ORDER: &str = include_str!("../../fuzz/schema.json");

#[test]
fn every_type_is_exact() {
    let schema = schema(ORDER);
    let payload = r#"{"id":"a","items":[{"price":19.9,"sizes":[5,null,-10]},{"sizes":[],"price":"0.10"},{"price":1e3}],
        "labels":{"x":["1","2"],"":[],"y z":["\u00fc"]},"address":{"geo":{"lon":1.5,"lat":-0.1},"city":"Berlin","zip":1},
        "day":"1970-01-02","time":"02:00:00.5+02:00","local":"1970-01-01T00:00:01","clock":"00:00:00.000001",
        "ratio":0.1,"body":"AP8=","note": { "a" : [1, 2] } ,"code":"AB"}"#;
    let expected = json!({
        "id": "a",
        "items": [{"price": "19.90", "sizes": [5, null, -10]}, {"price": "0.10", "sizes": []},
            {"price": "1000.00", "sizes": null}],
        "labels": {"x": ["1", "2"], "": [], "y z": ["ü"]},
        "address": {"city": "Berlin", "geo": {"lat": "-0.1", "lon": "1.5"}},
        "day": 1, "time": 500_000, "local": 1_000_000, "clock": 1, "ratio": "0.1", "body": [0, 255],
        "note": "{ \"a\" : [1, 2] }", "code": "AB",
    });
    assert_eq!(verdict(&schema, payload), Ok(expected));
    let sparse = verdict(&schema, r#"{"items":[{"price":0}],"id":"b","address":null}"#).unwrap();
    assert_eq!(sparse["items"], json!([{"price": "0.00", "sizes": null}]));
    assert!(["labels", "address", "note", "body"].iter().all(|column| sparse[*column].is_null()));
}

#[test]
fn paths_lead_to_the_value() {
    use Reason::*;
    let schema = schema(ORDER);
    for (member, reason, path) in [
        (r#""items":[{"price":1},{"price":2},{"price":"x"}]"#, BadFormat, "$.items[2].price"),
        (r#""items":[{"price":-1}]"#, OutOfRange, "$.items[0].price"),
        (r#""items":[{"price":"-0.01"}]"#, OutOfRange, "$.items[0].price"),
        (r#""items":[{"price":0.001}]"#, NumberOutOfRange, "$.items[0].price"),
        (r#""items":[{"price":10000}]"#, NumberOutOfRange, "$.items[0].price"),
        (r#""items":[{"price":1e400}]"#, NumberOutOfRange, "$.items[0].price"),
        (r#""items":[{"price":"1 "}]"#, BadFormat, "$.items[0].price"),
        (r#""items":[{"price":"01"}]"#, BadFormat, "$.items[0].price"),
        (r#""items":[{"price":""}]"#, BadFormat, "$.items[0].price"),
        (r#""items":[{"price":true}]"#, WrongType, "$.items[0].price"),
        (r#""items":[{"price":1},{}]"#, MissingField, "$.items[1].price"),
        (r#""items":[{"price":1,"price":1}]"#, DuplicateKey, "$.items[0].price"),
        (r#""items":[{"price":1,"prize":1}]"#, UnknownField, "$.items[0].prize"),
        (r#""items":[{"price":1,"sizes":[5,7]}]"#, OutOfRange, "$.items[0].sizes[1]"),
        (r#""items":[{"price":1,"sizes":[5,5.5]}]"#, WrongType, "$.items[0].sizes[1]"),
        (r#""items":[{"price":1,"sizes":{}}]"#, WrongType, "$.items[0].sizes"),
        (r#""items":[null]"#, WrongType, "$.items[0]"),
        (r#""items":[]"#, BadLength, "$.items"),
        (r#""items":[{"price":1},{"price":1},{"price":1},{"price":1}]"#, BadLength, "$.items"),
        (r#""items":{}"#, WrongType, "$.items"),
        (r#""items":[{"price":1}],"labels":{"a b":["x",1]}"#, WrongType, "$.labels['a b'][1]"),
        (r#""items":[{"price":1}],"labels":{"a":[],"\u0061":[]}"#, DuplicateKey, "$.labels.a"),
        (r#""items":[{"price":1}],"address":{"city":"x","geo":{}}"#, MissingField, "$.address.geo.lat"),
        (r#""items":[{"price":1}],"address":{"z":1,"city":"x","z":1}"#, DuplicateKey, "$.address.z"),
        (r#""items":[{"price":1}],"note":1.5"#, WrongType, "$.note"),
        (r#""items":[{"price":1}],"note":[]"#, WrongType, "$.note"),
        (r#""items":[{"price":1}],"body":"AP8""#, BadFormat, "$.body"),
        (r#""items":[{"price":1}],"ratio":1e39"#, NumberOutOfRange, "$.ratio"),
        (r#""items":[{"price":1}],"code":"Ab""#, BadFormat, "$.code"),
        (r#""items":[{"price":1}],"time":"12:00:00""#, BadFormat, "$.time"),
        (r#""items":[{"price":1}],"local":"2026-01-01T12:00:00Z""#, BadFormat, "$.local"),
        (r#""items":[{"price":1}"#, MalformedJson, "$"),
        (r#""items":[{"price":1},]"#, MalformedJson, "$"),
        (r#""items":[{"price":1}],"labels":{"a":[],}"#, MalformedJson, "$"),
        (r#""items":[{"price":"x"}],"note":tru"#, MalformedJson, "$"),
    ] {
        let payload = format!(r#"{{"id":"a",{member}}}"#);
        let (found, at, message) = verdict(&schema, &payload).expect_err(&payload);
        assert_eq!((found, at.as_str()), (reason, path), "{payload}: {message}");
    }
}

#[test]
fn decimals_are_exact_to_the_last_digit() {
    let text = |precision, scale| {
        format!(
            r#"{{"type":"object","properties":{{"d":{{"type":["number","string","null"],"format":"decimal",
                "x-precision":{precision},"x-scale":{scale}}}}}}}"#
        )
    };
    let wide = schema(&text(38, 10));
    for digits in
        ["1234567890123456789012345678.0123456789", "-9999999999999999999999999999.9999999999", "0.0000000001"]
    {
        for payload in [format!(r#"{{"d":{digits}}}"#), format!(r#"{{"d":"{digits}"}}"#)] {
            assert_eq!(verdict(&wide, &payload).unwrap()["d"], digits, "{payload}");
        }
    }
    let whole = schema(&text(38, 0));
    assert_eq!(verdict(&whole, &format!(r#"{{"d":{}}}"#, "9".repeat(38))).unwrap()["d"], "9".repeat(38));
    assert_eq!(verdict(&whole, r#"{"d":1.20e1}"#).unwrap()["d"], "12");
    for over in [format!("1{}", "0".repeat(38)), "1e38".to_owned(), "0.1".to_owned(), "1e-1".to_owned()] {
        assert_eq!(verdict(&whole, &format!(r#"{{"d":{over}}}"#)).unwrap_err().0, Reason::NumberOutOfRange, "{over}");
    }
}

#[test]
fn a_refused_record_leaves_no_trace_in_nested_columns() {
    let schema = schema(ORDER);
    let valid = [
        r#"{"id":"a","items":[{"price":1,"sizes":[5]},{"price":2}],"labels":{"k":["v"]},"address":{"city":"x"},"body":"AP8="}"#,
        r#"{"id":"b","items":[{"price":3,"sizes":[]}],"labels":{},"note":"n"}"#,
        r#"{"id":"c","items":[{"price":4,"sizes":[null]}],"address":null}"#,
    ];
    let invalid = [
        r#"{"id":"z","items":[{"price":9,"sizes":[10,15,7]}]}"#,
        r#"{"labels":{"z":["z","zz"],"y":["y",1]},"id":"z","items":[]}"#,
        r#"{"id":"z","address":{"city":"z","geo":{"lat":1,"lon":"z"}},"items":[{"price":9}]}"#,
        r#"{"id":"z","body":"AP8=AP8=","items":[{"price":9}]}"#,
        r#"{"id":"z","items":[{"price":9,"sizes":[10]},{"price":9}],"labels":{"z":[]},"note":{"z":1},"code":"z"}"#,
        r#"{"id":"z","items":[{"price":9},{"sizes":[10"#,
    ];
    let alone: Vec<Value> = valid.iter().map(|payload| verdict(&schema, payload).unwrap()).collect();
    let mut payloads = Vec::new();
    for i in 0..300 {
        payloads.extend(invalid.iter().cycle().skip(i).take(i % 7));
        payloads.push(&valid[i % 3]);
    }
    let decoded = decode(&schema, payloads.iter().map(|p| **p));
    assert_eq!(decoded.batch.num_rows(), 300);
    for i in 0..300 {
        assert_eq!(row(&decoded.batch, i), alone[i % 3]);
    }
}

#[test]
fn what_the_schema_leaves_open_is_kept_where_it_is_asked_for() {
    let text = r#"{"type":"object","required":["a"],"properties":{"a":{"type":"integer"}}}"#;
    let schema = Schema::parse_with_extra(text, Some("_extra")).unwrap();
    let payloads = [
        r#"{"x": {"y" : [1, 1e400]} , "a":1,"\u007a":"\""}"#,
        r#"{"a":2}"#,
        r#"{"x":1,"a":"no"}"#,
        r#"{"a":3,"b":null}"#,
    ];
    let decoded = decode(&schema, payloads);
    let extra: Vec<Value> = (0..3).map(|i| row(&decoded.batch, i)["_extra"].clone()).collect();
    assert_eq!(extra, [json!(r#"{"x": {"y" : [1, 1e400]},"\u007a":"\""}"#), Value::Null, json!(r#"{"b":null}"#)]);
    assert_eq!(verdict(&schema, r#"{"x":1,"a":1,"x":2}"#).unwrap_err().0, Reason::DuplicateKey);
}

#[test]
fn other_keywords_are_checked_by_the_validator() {
    let schema = schema(
        r#"{"type":"object","properties":{
            "email":{"type":"string","format":"email"},"kind":{"type":"string"},"size":{"type":"integer"},
            "tags":{"type":"array","items":{"type":"string"},"uniqueItems":true},
            "items":{"type":"array","items":{"type":"object","properties":{"n":{"type":"integer","not":{"const":3}}}}},
            "any":{"anyOf":[{"type":"string"},{"type":"object","required":["x"]}]}},
            "if":{"properties":{"kind":{"const":"box"}},"required":["kind"]},"then":{"required":["size"]},
            "patternProperties":{"^x-":{"type":"integer"}},"dependentRequired":{"size":["kind"]}}"#,
    );
    let valid = r#"{"kind":"box","size":1,"email":"a@b.cd","tags":["a","b"],"items":[{"n":1}],"x-a":1,"any":{"x":1}}"#;
    assert_eq!(verdict(&schema, valid).unwrap()["any"], r#"{"x":1}"#);
    for (payload, path, message) in [
        (r#"{"kind":"box"}"#, "$", "\"size\" is a required property"),
        (r#"{"size":1}"#, "$", "\"kind\" is a required property"),
        (r#"{"email":"nobody"}"#, "$.email", "is not a \"email\""),
        (r#"{"tags":["a","b","a"]}"#, "$.tags", "non-unique"),
        (r#"{"items":[{"n":1},{"n":3}]}"#, "$.items[1].n", "3"),
        (r#"{"x-a":"1"}"#, "$['x-a']", "is not of type \"integer\""),
        (r#"{"any":1}"#, "$.any", "anyOf"),
    ] {
        let (reason, at, text) = verdict(&schema, payload).expect_err(payload);
        assert_eq!((reason, at.as_str()), (Reason::SchemaViolation, path), "{payload}: {text}");
        assert!(text.contains(message), "{payload}: {text}");
    }
    // The second pass refuses what it could not judge.
    assert_eq!(verdict(&schema, r#"{"open":[{"a":1,"a":1}]}"#).unwrap_err().1, "$.open[0].a");
    assert_eq!(verdict(&schema, r#"{"open":[1e400]}"#).unwrap_err().0, Reason::NumberOutOfRange);
    let deep = format!("{{\"open\":{}{}}}", "[".repeat(127), "]".repeat(127));
    assert!(verdict(&schema, &deep).is_ok());
    let long = format!(r#"{{"email":"{}"}}"#, "x".repeat(10_000));
    assert!(verdict(&schema, &long).unwrap_err().2.chars().count() < 300);
}

/// The JSONTestSuite's parsing cases that are short texts (`tests/json_parsing`, MIT licence).
#[test]
fn the_parsing_suite_is_judged_as_it_says() {
    let schema = schema(r#"{"type":"object","properties":{"v":true}}"#);
    let cases: Vec<(String, String)> =
        serde_json::from_str(include_str!("../../tests/json_parsing/cases.json")).unwrap();
    for (name, input) in &cases {
        let found = verdict(&schema, &format!("{{\"v\":{input}}}"));
        match name.as_bytes()[0] {
            b'y' => assert!(found.is_ok(), "{name}: {input}: {found:?}"),
            b'n' => assert!(found.is_err(), "{name}: {input}"),
            // Numbers of any size are JSON; lone surrogates have no UTF-8, and a byte order mark is none.
            _ => assert_eq!(found.is_ok(), name.starts_with("i_number"), "{name}: {input}: {found:?}"),
        }
    }
    assert!(cases.len() > 280, "{}", cases.len());
}

struct Numbers {
    state: u64,
    /// A value that may not fit its schema was made.
    odd: bool,
}

impl Numbers {
    fn new(state: u64) -> Numbers {
        Numbers { state, odd: false }
    }

    fn below(&mut self, limit: usize) -> usize {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % limit as u64) as usize
    }

    fn one_of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len())]
    }
}

/// A schema of the grammar that the decoder checks by itself.
fn random_schema(n: &mut Numbers, depth: usize) -> Value {
    let null = n.below(4) == 0;
    let types = |name: &str| if null { json!([name, "null"]) } else { json!(name) };
    match n.below(if depth == 0 { 10 } else { 14 }) {
        0 => json!({"type": types("boolean")}),
        1 => json!({"type": types("integer"), "minimum": n.below(10), "maximum": 10 + n.below(50)}),
        2 => json!({"type": types("integer"), "multipleOf": 1 + n.below(4)}),
        3 => json!({"type": types("number"), "exclusiveMinimum": -(n.below(5) as i64), "maximum": 30.5}),
        4 => json!({"type": types("string"), "minLength": n.below(3), "maxLength": 3 + n.below(6)}),
        5 => json!({"type": types("string"), "enum": ["a", "bc", "ü"]}),
        6 => json!({"type": types("string"), "pattern": n.one_of(&["^[a-c]", "\\d+", "^.{1,3}$", "x|b"])}),
        7 => json!({"type": types("string"), "format": n.one_of(&["date-time", "date", "time", "uuid"])}),
        8 => json!({"type": types("number"), "format": "decimal", "x-precision": 20, "x-scale": n.below(6)}),
        9 => json!({"type": [n.one_of(&["string", "boolean"]), n.one_of(&["integer", "number"])]}),
        10 => {
            json!({"type": types("array"), "items": random_schema(n, depth - 1), "minItems": n.below(2), "maxItems": 2 + n.below(3)})
        }
        11 => json!({"type": types("object"), "additionalProperties": random_schema(n, depth - 1)}),
        12 => json!({"anyOf": [random_schema(n, depth - 1), {"type": "null"}]}),
        _ => random_object(n, depth - 1),
    }
}

fn random_object(n: &mut Numbers, depth: usize) -> Value {
    let names = ["a", "b", "c d", "é"];
    let count = 1 + n.below(4);
    let properties: serde_json::Map<String, Value> =
        names[..count].iter().map(|name| ((*name).to_owned(), random_schema(n, depth))).collect();
    let required: Vec<&str> = names[..count].iter().copied().filter(|_| n.below(2) == 0).collect();
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": n.below(2) == 0})
}

/// A document that fits mostly, as text, and what the columns hold of it if it does.
fn random_document(n: &mut Numbers, schema: &Value) -> (String, Value) {
    if n.below(40) == 0 {
        n.odd = true;
        return (
            n.one_of(&["null", "5", "\"a\"", "[]", "{}", "true", "-1.5", "1.0", "\"2026-01-01\""]).to_owned(),
            Value::Null,
        );
    }
    if let Some(branches) = schema["anyOf"].as_array() {
        return if n.below(4) == 0 { ("null".into(), Value::Null) } else { random_document(n, &branches[0]) };
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        other => other.as_str().into_iter().collect(),
    };
    let picked = types[n.below(types.len())];
    let mixed = types.len() > 1 && !types.contains(&"null");
    let (text, value) = match picked {
        "null" => return ("null".into(), Value::Null),
        "boolean" => {
            let b = n.below(2) == 0;
            (b.to_string(), json!(b))
        }
        "integer" => {
            let whole = n.below(60) as i64 * if n.below(9) == 0 { -1 } else { 1 };
            (n.one_of(&["", "", ".0", "e0"]).to_owned(), json!(whole)).into_text(whole)
        }
        "number" if schema["format"] == "decimal" => {
            let scale = schema["x-scale"].as_u64().unwrap_or(0) as usize;
            let digits = format!(
                "{}{:0scale$}",
                1 + n.below(99999),
                if scale > 0 { n.below(10usize.pow(scale as u32)) } else { 0 }
            );
            let text = if scale == 0 {
                digits[..digits.len() - 1].to_owned() + "7"
            } else {
                format!("{}.{}", &digits[..digits.len() - scale], &digits[digits.len() - scale..])
            };
            (text.clone(), json!(text))
        }
        "number" => {
            let number = n.below(4000) as f64 / 100.0 - 5.0;
            (number.to_string(), json!(format!("{number:?}")))
        }
        "string" => {
            let micros = n.below(1_000_000_000) as i64 * 1_000_003;
            let time = jiff::Timestamp::from_microsecond(micros).unwrap().to_zoned(jiff::tz::TimeZone::UTC);
            let days = micros.div_euclid(86_400_000_000);
            match schema["format"].as_str() {
                Some("date-time") => (format!("\"{}\"", time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ")), json!(micros)),
                Some("date") => (format!("\"{}\"", time.strftime("%Y-%m-%d")), json!(days)),
                Some("time") => {
                    (format!("\"{}\"", time.strftime("%H:%M:%S.%6fZ")), json!(micros.rem_euclid(86_400_000_000)))
                }
                Some(_) => {
                    let uuid = uuid::Uuid::from_u128(u128::from(n.state) * 7).to_string();
                    (format!("\"{uuid}\""), json!(uuid))
                }
                None => {
                    let text = n.one_of(&["a", "bc", "ü", "", "abc", "12", "x y", "longer text", "€uro"]);
                    (json!(text).to_string(), json!(text))
                }
            }
        }
        "array" => {
            let items: Vec<_> = (0..n.below(5)).map(|_| random_document(n, &schema["items"])).collect();
            let text = items.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>().join(", ");
            (format!("[{text}]"), Value::Array(items.into_iter().map(|(_, value)| value).collect()))
        }
        _ => {
            let mut members = Vec::new();
            let mut value = serde_json::Map::new();
            if let Some(properties) = schema["properties"].as_object() {
                for (name, property) in properties {
                    let required = schema["required"].as_array().is_some_and(|r| r.contains(&json!(name)));
                    let (text, inner) = random_document(n, property);
                    if n.below(if required { 30 } else { 3 }) > 0 {
                        members.push(format!("{}:{text}", json!(name)));
                        value.insert(name.clone(), inner);
                    } else {
                        value.insert(name.clone(), Value::Null);
                    }
                }
                if n.below(8) == 0 {
                    members.push("\"other\": 1".to_owned());
                }
            } else {
                for key in ["k", "l m"].iter().take(n.below(3)) {
                    let (text, inner) = random_document(n, &schema["additionalProperties"]);
                    members.push(format!("{}:{text}", json!(key)));
                    value.insert((*key).to_owned(), inner);
                }
            }
            (format!("{{{}}}", members.join(",")), Value::Object(value))
        }
    };
    // A column of several types holds the text.
    if mixed { (text.clone(), json!(text)) } else { (text, value) }
}

trait IntoText {
    fn into_text(self, whole: i64) -> (String, Value);
}

impl IntoText for (String, Value) {
    fn into_text(self, whole: i64) -> (String, Value) {
        (format!("{whole}{}", self.0), self.1)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_schemas_judge_random_documents_as_the_crate_does(seed in any::<u64>()) {
        let n = &mut Numbers::new(seed);
        let document = random_object(n, 3);
        let text = document.to_string();
        let schema = schema(&text);
        prop_assert!(schema.validator.is_none(), "{}: {:?}", text, schema.slow_keywords);
        let validator = Validator::new(&text).unwrap();
        for _ in 0..8 {
            n.odd = false;
            let (payload, expected) = random_document(n, &document);
            let parsed: Value = serde_json::from_str(&payload).unwrap();
            let found = verdict(&schema, &payload);
            match (validator.check(&parsed), found) {
                // What does not fit by chance may be valid too: then its value is not foreseen.
                (Ok(()), Ok(found)) if !n.odd => prop_assert_eq!(found, expected, "{}\n{}", text, payload),
                (Ok(()), Ok(_)) => {}
                (Err(_), Err(_)) => {}
                (Ok(()), Err((Reason::NumberOutOfRange, ..))) => {}
                (crate_says, we_say) => {
                    prop_assert!(false, "{}\n{}\nthe crate: {:?}\nthe decoder: {:?}", text, payload, crate_says, we_say);
                }
            }
        }
    }
}

/// No payload panics, hangs or is lost. `FLOE_FUZZ_PAYLOADS` sets how many are tried.
#[test]
fn mutated_payloads_are_decoded_or_refused() {
    let count = std::env::var("FLOE_FUZZ_PAYLOADS").ok().and_then(|n| n.parse().ok()).unwrap_or(1_000_000);
    let schema = Schema::parse_with_extra(ORDER, Some("_extra")).unwrap();
    let mut decoder = Decoder::new(schema);
    let seeds: [&[u8]; 4] = [
        r#"{"id":"ü😀","items":[{"price":19.9,"sizes":[5,null]},{"price":"0.10"}],"labels":{"x":["1"]}}"#.as_bytes(),
        br#"{"id":"a","items":[{"price":1e3}],"address":{"geo":{"lat":-0.1},"city":"B"},"day":"1970-01-02"}"#,
        br#"{"id":"\ud83d\ude00","items":[{"price":1}],"time":"02:00:00.5+02:00","local":"1970-01-01T00:00:01"}"#,
        br#"{"id":"","items":[{"price":0}],"ratio":0.1,"body":"AP8=","note":{"a":[1,2]},"code":"AB","z":[{}]}"#,
    ];
    const INTERESTING: &[u8] = b"{}[]\",:\\ 0123456789eE+-.tfnu\0\x1f\x7f\x80\xc3\xbc\xff\n";
    let n = &mut Numbers::new(7);
    let mut done = 0;
    let mut valid = 0;
    let mut payload = Vec::new();
    while done < count {
        let mut chunk = Chunk::default();
        for _ in 0..1000 {
            payload.clear();
            payload.extend_from_slice(seeds[n.below(4)]);
            for _ in 0..n.below(3) {
                let at = n.below(payload.len());
                match n.below(4) {
                    0 => payload[at] = INTERESTING[n.below(INTERESTING.len())],
                    1 => payload[at] ^= 1 << n.below(8),
                    2 => payload.insert(at, INTERESTING[n.below(INTERESTING.len())]),
                    _ => payload.truncate(at.max(1)),
                }
            }
            let begin = chunk.data.len() as u32;
            chunk.data.extend_from_slice(&payload);
            let value_len = payload.len() as u32;
            chunk.records.push(Record { offset: 0, timestamp_ms: 0, begin, key_len: Record::NONE, value_len });
        }
        let decoded = decoder.decode(&chunk);
        assert_eq!(decoded.records.len() + decoded.rejected.len(), 1000);
        assert_eq!(decoded.batch.num_rows(), decoded.records.len());
        valid += decoded.records.len();
        done += 1000;
    }
    assert!(valid > count / 10 && valid < count, "{valid} of {count}");
}
