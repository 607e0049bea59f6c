//! The official JSON-Schema-Test-Suite for draft 2020-12 (`tests/json_schema_suite`, MIT licence), required and format
//! tests. Each case becomes the property `value` of an object, so that it makes a column.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::Schema;
use crate::decode::Decoder;
use crate::source::{Chunk, Record};

#[derive(Debug, Default, PartialEq)]
struct Counts {
    /// The decoder has the suite's verdict.
    agree: usize,
    /// … and all of the schema is checked by the decoder itself.
    in_one_pass: usize,
    /// … and the column is not JSON text.
    typed: usize,
    skipped: usize,
}

/// Cases where the verdicts differ, each with the reason why that is meant.
const DIFFERENT: &[(&str, &str)] = &[
    // An int64 column holds no larger integer.
    ("bignum", "a bignum is an integer"),
    ("bignum", "a negative bignum is an integer"),
    ("float-overflow", "valid if optional overflow handling is implemented"),
    // Formats assert.
    ("format", "invalid"),
    // So does base64.
    ("content", "an invalid base64 string"),
    // Metaschemas other than the draft's are refused; here only the rest of the schema is tried.
    ("vocabulary", "no validation: invalid number"),
];

fn is_valid(schema: &std::sync::Arc<Schema>, document: &str) -> Result<(), String> {
    let mut chunk = Chunk::default();
    chunk.data.extend_from_slice(document.as_bytes());
    let value_len = document.len() as u32;
    chunk.records.push(Record { offset: 0, timestamp_ms: 0, begin: 0, key_len: Record::NONE, value_len });
    let decoded = Decoder::new(schema.clone()).decode(&chunk);
    match decoded.rejected.first() {
        None => Ok(()),
        Some(r) => Err(format!("{} at {}: {}", r.reason.code(), r.path, r.message)),
    }
}

/// The schema as a property. References into it stay true because it becomes a resource of its own.
fn wrap(schema: &Value) -> String {
    let mut inner = schema.clone();
    let text = schema.to_string();
    if let Some(members) = inner.as_object_mut() {
        members.remove("$schema");
        if ["\"$ref\"", "\"$dynamicRef\"", "\"$anchor\"", "\"$dynamicAnchor\""].iter().any(|k| text.contains(k)) {
            members.entry("$id").or_insert_with(|| json!("http://localhost/case.json"));
        }
    }
    json!({"type": "object", "properties": {"value": inner}, "required": ["value"]}).to_string()
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn run(folder: &Path, counts: &mut BTreeMap<String, Counts>, wrong: &mut Vec<String>) {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|e| e == "json")) {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let counts = counts.entry(name.to_owned()).or_default();
        let groups: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        for group in groups.as_array().unwrap() {
            let tests = group["tests"].as_array().unwrap();
            for (test, typed) in tests.iter().flat_map(|test| [(test, false), (test, true)]) {
                // A value has its own type: to say so changes no verdict, if no reference comes back to it, and makes
                // a column of that type.
                let mut schema = group["schema"].clone();
                if typed {
                    let refers = schema.to_string().contains("Ref\"") || schema.to_string().contains("$ref\"");
                    match schema.as_object_mut() {
                        Some(members) if !members.contains_key("type") && !refers => {
                            members.insert("type".to_owned(), json!(type_of(&test["data"])));
                        }
                        _ => continue,
                    }
                }
                let schema = match Schema::parse(&wrap(&schema)) {
                    Ok(schema) => schema,
                    Err(problems) => {
                        println!("skipped {name}: {}: {}", group["description"], problems.join("; "));
                        counts.skipped += 1;
                        continue;
                    }
                };
                let document = format!("{{\"value\":{}}}", test["data"]);
                let found = is_valid(&schema, &document);
                let description = test["description"].as_str().unwrap();
                if found.is_ok() == test["valid"].as_bool().unwrap() {
                    counts.agree += 1;
                    if schema.slow_keywords.is_empty() {
                        counts.in_one_pass += 1;
                        let json = matches!(schema.object.fields[0].value, super::ValueType::Json(_));
                        counts.typed += usize::from(!json);
                    }
                } else if DIFFERENT.iter().any(|(file, start)| name == *file && description.starts_with(start)) {
                    counts.skipped += 1;
                } else {
                    wrong.push(format!("{name}: {}: {description}: {document}: {found:?}", group["description"]));
                }
            }
        }
    }
}

#[test]
fn the_official_suite_s_verdicts_are_ours() {
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/json_schema_suite/draft2020-12");
    let mut counts = BTreeMap::new();
    let mut wrong = Vec::new();
    run(&suite, &mut counts, &mut wrong);
    run(&suite.join("optional/format"), &mut counts, &mut wrong);
    let sum = |of: fn(&Counts) -> usize| counts.values().map(of).sum::<usize>();
    let (agree, in_one_pass, typed) = (sum(|c| c.agree), sum(|c| c.in_one_pass), sum(|c| c.typed));
    println!("{counts:#?}");
    println!("{agree} agree, {in_one_pass} of them in one pass, {typed} typed; {} skipped", sum(|c| c.skipped));
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(agree >= 1590 && in_one_pass >= 194 && typed >= 104, "the suite is covered less than before");
}
