use super::*;

fn parse(text: &str) -> Result<Arc<Schema>, Vec<String>> {
    Schema::parse(text)
}

fn property(text: &str) -> Result<Arc<Schema>, Vec<String>> {
    parse(&format!(r#"{{"type":"object","properties":{{"a":{text}}}}}"#))
}

#[test]
fn the_telemetry_schema_describes_itself() {
    let schema = parse(include_str!("../../schemas/telemetry.json")).unwrap();
    assert!(!schema.closed);
    let lines = schema.describe();
    let expected = [
        "device_id        string          not null  a string of at least 1 characters",
        "event_timestamp  timestamptz(us) not null  an RFC 3339 date-time with an offset, such as 2026-01-31T23:59:59.5Z",
        "battery_level    float64         nullable  a number from 0 to 100, or null",
        "signal_strength  float64         nullable  a number from -150 to 0, or null",
        "latitude         float64         nullable  a number from -90 to 90, or null",
        "longitude        float64         nullable  a number from -180 to 180, or null",
        "duration_ms      int64           nullable  an integer from 0, or null",
        r#"status           string          nullable  one of "charging", "error", "idle", "offline", "online", "test", or null"#,
    ];
    let squeeze = |s: &str| s.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(lines.iter().map(|l| squeeze(l)).collect::<Vec<_>>(), expected.map(squeeze));
}

#[test]
fn columns_follow_the_order_of_the_document() {
    let schema = parse(
        r#"{"required":["m"],"properties":{"z":{"type":"string"},"m":{"type":["null","integer"],"format":"int32"},
            "a":{"type":"string","format":"date"},"b":{"type":"string","format":"date-time"},"u":{"type":"string","format":"uuid"},
            "n":{"type":["integer","number"]},"x":{"type":"boolean"}},"type":"object","additionalProperties":false}"#,
    )
    .unwrap();
    assert!(schema.closed);
    let found: Vec<_> = schema.arrow.fields().iter().map(|f| (f.name().as_str(), f.data_type().clone())).collect();
    let micros = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    let expected = vec![
        ("z", DataType::Utf8),
        ("m", DataType::Int32),
        ("a", DataType::Date32),
        ("b", micros),
        ("u", DataType::Utf8),
        ("n", DataType::Float64),
        ("x", DataType::Boolean),
    ];
    assert_eq!(found, expected);
    assert!(schema.fields[1].required && schema.fields[1].nullable && schema.fields[1].accepts_null);
    assert!(schema.fields[0].nullable && !schema.fields[0].accepts_null);
}

#[test]
fn bounds_are_rounded_inwards() {
    let integer = |text: &str| match &property(text).unwrap().fields[0].value {
        ValueType::Integer(t) => (t.min, t.max),
        other => panic!("{other:?}"),
    };
    assert_eq!(integer(r#"{"type":"integer","minimum":0.5,"maximum":9.5}"#), (1, 9));
    assert_eq!(integer(r#"{"type":"integer","exclusiveMinimum":0,"exclusiveMaximum":10}"#), (1, 9));
    assert_eq!(integer(r#"{"type":"integer","exclusiveMinimum":-0.5,"exclusiveMaximum":9.5}"#), (0, 9));
    assert_eq!(integer(r#"{"type":"integer","minimum":-1e30,"maximum":18446744073709551615}"#), (i64::MIN, i64::MAX));
    assert_eq!(integer(r#"{"type":"integer","format":"int32","minimum":-5e9}"#), (i32::MIN.into(), i32::MAX.into()));
    let number = property(r#"{"type":"number","exclusiveMinimum":0,"minimum":-1}"#).unwrap();
    assert!(matches!(&number.fields[0].value, ValueType::Number(t) if t.min == 5e-324 && t.max == f64::MAX));
}

#[test]
fn null_is_valid_only_where_type_and_enum_allow_it() {
    let accepts = |text: &str| property(text).unwrap().fields[0].accepts_null;
    assert!(accepts(r#"{"type":["string","null"]}"#));
    assert!(accepts(r#"{"type":["string","null"],"enum":["a",null]}"#));
    assert!(!accepts(r#"{"type":["string","null"],"enum":["a"]}"#));
    assert!(!accepts(r#"{"type":"string"}"#));
}

#[test]
fn every_problem_is_reported_with_its_place() {
    let problems = parse(
        r#"{
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "allOf": [],
            "additionalProperties": {"type": "string"},
            "required": ["gone", "a", "a", 5],
            "properties": {
                "_kafka_offset": {"type": "integer"},
                "": {"type": "integer"},
                "a": {"type": "object"},
                "a/b~": {"type": ["string", "integer"]},
                "c": {"$ref": "other.json"},
                "d": {"type": "string", "pattern": "x", "format": "email", "minLength": -1},
                "e": {"type": "integer", "minimum": "0", "minLength": 1},
                "f": {"type": "integer", "minimum": 5, "maximum": 4},
                "g": {"type": "string", "enum": []},
                "h": {"type": "string", "enum": ["a", null, 1]},
                "i": {"type": "boolean", "const": "yes"},
                "j": true,
                "k": {"type": "null"},
                "l": {"type": "string"},
                "l": {"type": "string"},
                "m": {"type": "string", "enum": ["a"], "const": "b"},
                "n": {"type": "string", "minLength": 3, "maxLength": 2}
            }
        }"#,
    )
    .unwrap_err();
    let expected = [
        "/$schema: found \"http://json-schema.org/draft-07/schema#\"",
        "/allOf: found the keyword \"allOf\"",
        "/additionalProperties: found an object; allowed are true and false",
        "/required/2: found \"a\" again",
        "/required/3: found 5",
        "/required: found \"gone\"",
        "/properties/_kafka_offset: found",
        "/properties/: found an empty name",
        "/properties/a/type: found \"object\"; allowed are \"string\", \"integer\"",
        "/properties/a~1b~0/type: found [\"string\", \"integer\"]",
        "/properties/c: found no `type`",
        "/properties/d/pattern: found the keyword",
        "/properties/d/format: found \"email\"; allowed for type string are date-time, date, uuid",
        "/properties/d/minLength: found -1",
        "/properties/e/minimum: found \"0\"; allowed is a number",
        "/properties/e/minLength: found the keyword \"minLength\"; allowed for type integer are",
        "/properties/f: found a range from 5 to 4",
        "/properties/g/enum: found []",
        "/properties/h/enum: found null",
        "/properties/h/enum: found 1",
        "/properties/i/const: found \"yes\"",
        "/properties/j: found true",
        "/properties/k/type: found \"null\"",
        "/properties/l: found \"l\" a second time",
        "/properties/m/const: found \"b\"",
        "/properties/n: found a range from 3 to 2",
    ];
    for start in expected {
        assert!(problems.iter().any(|p| p.starts_with(start)), "{start}\nnot in\n{}", problems.join("\n"));
    }
    assert_eq!(problems.len(), expected.len(), "{}", problems.join("\n"));
}

#[test]
fn documents_that_are_no_schema_of_an_object_are_refused() {
    for text in [
        "",
        "[]",
        "true",
        "{}",
        r#"{"type":"array"}"#,
        r#"{"type":"object"}"#,
        r#"{"type":"object","properties":{}}"#,
        r#"{"type":"object","properties":[]}"#,
        r#"{"properties":{"a":{"type":"string"}}}"#,
        "{\"type\":\"object\"} x",
    ] {
        assert!(!parse(text).unwrap_err().is_empty(), "{text}");
    }
    let missing = Schema::load(Path::new("no/such/file.json")).unwrap_err();
    assert!(missing[0].starts_with("no/such/file.json: "));
}
