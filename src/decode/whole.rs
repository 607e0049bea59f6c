//! A whole document as a [`Value`], for the validator: only those that the scanner has found to be JSON within its depth
//! come here, so that recursion is bounded.

use serde_json::{Map, Value};

use crate::dead_letter::Reason;

use super::fault::{Fault, Scan, step_to};
use super::scan::Scanner;

pub fn read(text: &[u8]) -> Scan<Value> {
    value(&mut Scanner::new(text))
}

fn value(scanner: &mut Scanner<'_>) -> Scan<Value> {
    scanner.skip_whitespace();
    match scanner.peek() {
        Some(b'"') => Ok(Value::String(string(scanner)?)),
        Some(b't') => scanner.literal("true").map(|()| Value::Bool(true)),
        Some(b'f') => scanner.literal("false").map(|()| Value::Bool(false)),
        Some(b'n') => scanner.literal("null").map(|()| Value::Null),
        Some(b'[') => {
            let mut items = Vec::new();
            scanner.at += 1;
            scanner.skip_whitespace();
            if scanner.peek() != Some(b']') {
                loop {
                    let item = value(scanner).map_err(|fault| fault.within(&format!("[{}]", items.len())))?;
                    items.push(item);
                    scanner.skip_whitespace();
                    if scanner.peek() != Some(b',') {
                        break;
                    }
                    scanner.at += 1;
                }
            }
            scanner.at += 1;
            Ok(Value::Array(items))
        }
        Some(b'{') => {
            let mut members = Map::new();
            scanner.at += 1;
            scanner.skip_whitespace();
            if scanner.peek() != Some(b'}') {
                loop {
                    scanner.skip_whitespace();
                    let key = string(scanner)?;
                    // Which of the two would be checked?
                    if members.contains_key(&key) {
                        return Err(Fault::duplicate(key.as_bytes()));
                    }
                    scanner.colon()?;
                    let member = value(scanner).map_err(|fault| fault.within(&step_to(&key)))?;
                    members.insert(key, member);
                    scanner.skip_whitespace();
                    if scanner.peek() != Some(b',') {
                        break;
                    }
                    scanner.at += 1;
                }
            }
            scanner.at += 1;
            Ok(Value::Object(members))
        }
        _ => match scanner.number()?.to_json() {
            Some(n) => Ok(Value::Number(n)),
            None => {
                let message = "the number is larger than any double, which is what the schema's validator compares";
                Err(Fault::new(Reason::NumberOutOfRange, "$", message))
            }
        },
    }
}

fn string(scanner: &mut Scanner<'_>) -> Scan<String> {
    let mut scratch = Vec::new();
    let text = scanner.string(&mut scratch)?;
    Ok(String::from_utf8_lossy(text).into_owned())
}
