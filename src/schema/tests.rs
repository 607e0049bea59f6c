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
    assert!(!schema.object.closed);
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
    assert!(schema.object.closed);
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
    assert!(
        schema.object.fields[1].required && schema.object.fields[1].nullable && schema.object.fields[1].accepts_null
    );
    assert!(schema.object.fields[0].nullable && !schema.object.fields[0].accepts_null);
}

#[test]
fn bounds_are_rounded_inwards() {
    let integer = |text: &str| match &property(text).unwrap().object.fields[0].value {
        ValueType::Integer(t) => (t.min, t.max),
        other => panic!("{other:?}"),
    };
    assert_eq!(integer(r#"{"type":"integer","minimum":0.5,"maximum":9.5}"#), (1, 9));
    assert_eq!(integer(r#"{"type":"integer","exclusiveMinimum":0,"exclusiveMaximum":10}"#), (1, 9));
    assert_eq!(integer(r#"{"type":"integer","exclusiveMinimum":-0.5,"exclusiveMaximum":9.5}"#), (0, 9));
    assert_eq!(integer(r#"{"type":"integer","minimum":-1e30,"maximum":18446744073709551615}"#), (i64::MIN, i64::MAX));
    assert_eq!(integer(r#"{"type":"integer","format":"int32","minimum":-5e9}"#), (i32::MIN.into(), i32::MAX.into()));
    let number = property(r#"{"type":"number","exclusiveMinimum":0,"minimum":-1}"#).unwrap();
    assert!(matches!(&number.object.fields[0].value, ValueType::Number(t) if t.min == 5e-324 && t.max == f64::MAX));
}

#[test]
fn null_is_valid_only_where_type_and_enum_allow_it() {
    let accepts = |text: &str| property(text).unwrap().object.fields[0].accepts_null;
    assert!(accepts(r#"{"type":["string","null"]}"#));
    assert!(accepts(r#"{"type":["string","null"],"enum":["a",null]}"#));
    assert!(!accepts(r#"{"type":["string","null"],"enum":["a"]}"#));
    assert!(!accepts(r#"{"type":"string"}"#));
}

#[test]
fn every_problem_is_reported_with_its_place() {
    let problems = parse(
        r##"{
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "required": ["a", "a", 5],
            "properties": {
                "_kafka_offset": {"type": "integer"},
                "": {"type": "integer"},
                "a": {"type": "objekt"},
                "a/b~": {"type": []},
                "c": {"$ref": "#/$defs/gone"},
                "d": {"type": "string", "format": "phone", "minLength": -1, "patern": "x", "x-note": 1},
                "e": {"type": "integer", "minimum": "0", "format": "float"},
                "f": {"type": "integer", "minimum": 5, "maximum": 4},
                "g": {"type": "string", "enum": []},
                "h": {"type": "string", "enum": [1, null]},
                "i": {"type": "boolean", "const": "yes"},
                "j": 5,
                "k": {"type": "number", "format": "decimal", "x-precision": 39, "x-scale": 2},
                "l": {"type": "string"},
                "l": {"type": "string"},
                "m": {"type": "string", "enum": ["a"], "const": "b"},
                "n": {"type": "string", "minLength": 3, "maxLength": 2},
                "o": {"type": "string", "format": "decimal", "x-precision": 9},
                "p": {"type": "array", "items": {"type": "object", "properties": {"q": {"typ": "string"}}}},
                "r": {"$ref": "#/$defs/tree"},
                "s": {"type": ["boolean", "number"], "format": "decimal"}
            },
            "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}
        }"##,
    )
    .unwrap_err();
    let expected = [
        "/$schema: found \"http://json-schema.org/draft-07/schema#\"",
        "/required/1: found \"a\" again",
        "/required/2: found 5",
        "/properties/_kafka_offset: found",
        "/properties/: found an empty name",
        "/properties/a/type: found \"objekt\"; allowed are \"string\", \"integer\"",
        "/properties/a~1b~0/type: found []",
        "/properties/c/$ref: found \"#/$defs/gone\"; there is no such place",
        "/properties/d/patern: found the keyword",
        "/properties/d/format: found \"phone\"; allowed for type string are",
        "/properties/d/minLength: found -1",
        "/properties/e/minimum: found \"0\"; allowed is a number",
        "/properties/e/format: found \"float\"; allowed for type integer are int32, int64",
        "/properties/f: found a range from 5 to 4",
        "/properties/g/enum: found []",
        "/properties/i/const: found \"yes\"",
        "/properties/j: found 5",
        "/properties/k/x-precision: found 39; a decimal needs one from 1 to 38",
        "/properties/l: found \"l\" a second time",
        "/properties/m/const: found \"b\"",
        "/properties/n: found a range from 3 to 2",
        "/properties/o/x-scale: found no `x-scale`; a decimal needs one from 0 to 9",
        "/properties/p/items/properties/q/typ: found the keyword \"typ\"",
        "/$defs/tree/items/$ref: found \"#/$defs/tree\", a schema inside itself",
        "/properties/s/type: found true or false, or a number; allowed with \"format\": \"decimal\"",
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
        r#"{"type":["object","null"]}"#,
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

/// A line of `describe` without its spaces between, by the column's name.
fn described(text: &str) -> Vec<String> {
    let schema = parse(text).unwrap_or_else(|problems| panic!("{text}: {}", problems.join("\n")));
    schema.describe().iter().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn every_type_has_its_column() {
    let lines = described(
        r##"{"type":"object","$defs":{"money":{"type":["string","number"],"format":"decimal","x-precision":10,"x-scale":2,
              "minimum":0.005,"exclusiveMaximum":100}},
            "properties":{
              "items":{"type":"array","minItems":1,"items":{"type":"object","required":["price"],"properties":{
                "price":{"$ref":"#/$defs/money"},"tags":{"type":"object","additionalProperties":{"type":"string"}}}}},
              "at":{"type":"string","format":"local-date-time"},"t":{"type":"string","format":"time"},
              "f":{"type":"number","format":"float"},"b":{"type":"string","contentEncoding":"base64"},
              "any":true,"two":{"type":["string","integer","null"]},"open":{"type":"object"},
              "maybe":{"anyOf":[{"type":"integer"},{"type":"null"}]},"one":{"allOf":[{"$ref":"#/$defs/money"}],"title":"x"},
              "word":{"enum":["a","b"]},"code":{"type":"string","pattern":"^[A-Z]{2}$"}
            }}"##,
    );
    let money =
        "a number, or a number in a string, of at most 8 digits before the point and 2 after it from 0.01 to 99.99";
    let expected = [
        "items list nullable a list of at least 1 items",
        "items.element struct not null an object",
        &format!("items.element.price decimal(10, 2) not null {money}"),
        "items.element.tags map nullable an object",
        "items.element.tags.value string not null a string",
        "at timestamp(us) nullable a date-time without an offset, such as 2026-01-31T23:59:59.5",
        "t time(us) nullable an RFC 3339 time with an offset, such as 23:59:59.5Z",
        "f float32 nullable a number",
        "b binary nullable base64 with padding, such as Zmxv",
        "any string (json) nullable any JSON value",
        "two string (json) nullable an integer, or a string, or null",
        "open string (json) nullable an object",
        "maybe int64 nullable an integer, or null",
        &format!("one decimal(10, 2) nullable {money}"),
        "word string nullable one of \"a\", \"b\"",
        "code string nullable a string that matches ^[A-Z]{2}$",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn keywords_for_the_validator_are_named() {
    let slow = |text: &str| parse(text).unwrap().slow_keywords.clone();
    let of = |property: &str| slow(&format!(r#"{{"type":"object","properties":{{"a":{property}}}}}"#));
    assert!(of(r#"{"type":"integer","multipleOf":5,"description":"x"}"#).is_empty());
    assert!(of(r#"{"type":"string","minimum":5}"#).is_empty());
    assert!(of(r#"{"type":"array","items":{},"uniqueItems":false}"#).is_empty());
    assert_eq!(of(r#"{"type":"number","multipleOf":0.5}"#), ["/properties/a: multipleOf"]);
    assert_eq!(of(r#"{"type":"string","pattern":"(?=a)"}"#), ["/properties/a: pattern"]);
    assert_eq!(of(r#"{"type":"string","format":"email"}"#), ["/properties/a: format"]);
    assert_eq!(
        of(r#"{"type":"array","items":{"not":{}},"uniqueItems":true}"#),
        ["/properties/a/items: not", "/properties/a: uniqueItems"]
    );
    assert_eq!(of(r#"{"type":["string","integer"],"enum":["a",1]}"#), ["/properties/a: enum"]);
    assert_eq!(
        of(r#"{"type":"object","properties":{"b":true},"patternProperties":{"x":{}},"additionalProperties":false}"#),
        ["/properties/a: additionalProperties", "/properties/a: patternProperties"]
    );
    assert_eq!(
        slow(r#"{"type":"object","properties":{"a":{}},"required":["b"],"if":{},"then":{}}"#),
        ["/: required", "/: if", "/: then"]
    );
}

#[test]
fn a_document_that_the_validator_refuses_is_refused() {
    for property in [
        r#"{"anyOf":{}}"#,
        r#"{"$ref":"http://example.com/other.json"}"#,
        r#"{"anyOf":[{"format":"phone"}]}"#,
        r#"{"pattern":"("}"#,
    ] {
        let problems = property_problems(property);
        assert!(problems[0].contains("no JSON Schema"), "{property}: {problems:?}");
    }
}

fn property_problems(text: &str) -> Vec<String> {
    property(text).unwrap_err()
}

#[test]
fn the_extra_column_comes_last_and_has_a_name_of_its_own() {
    let text =
        |closed: bool| format!(r#"{{"type":"object","properties":{{"a":true}},"additionalProperties":{}}}"#, !closed);
    let schema = Schema::parse_with_extra(&text(false), Some("_extra")).unwrap();
    assert_eq!(schema.arrow.field(1), &datatypes::Field::new("_extra", DataType::Utf8, true));
    assert!(Schema::parse_with_extra(&text(false), Some("a")).unwrap_err()[0].contains("choose another name"));
    assert!(Schema::parse_with_extra(&text(true), Some("_extra")).unwrap_err()[0].contains("nothing is left"));
}

#[test]
fn a_schema_that_grows_without_end_is_refused() {
    let mut defs: Vec<String> = (0..40)
        .map(|i| format!(r##""d{i}":{{"type":"object","properties":{{"a":{{"$ref":"#/$defs/d{n}"}},"b":{{"$ref":"#/$defs/d{n}"}}}}}}"##, n = i + 1))
        .collect();
    defs.push(r#""d40":{"type":"string"}"#.to_owned());
    let text = format!(r##"{{"$ref":"#/$defs/d0","$defs":{{{}}}}}"##, defs.join(","));
    assert!(!parse(&text).unwrap_err().is_empty());
}
