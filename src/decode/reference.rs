//! The same verdicts reached another way: serde_json reads the whole document, then the schema is applied to it. Slow
//! and plain; what [`super::Decoder`] is compared with.

use crate::dead_letter::Reason;
use crate::schema::document::Node;
use crate::schema::{Field, Schema, TextFormat, ValueType};

#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    Null,
    Boolean(bool),
    Integer(i64),
    /// Bits of a double.
    Number(u64),
    Text(String),
    Micros(i64),
    Days(i32),
}

pub enum Verdict {
    Row(Vec<Cell>),
    Refused(Reason, String),
    /// serde_json cannot tell: the number is beyond what it keeps exactly.
    Unknown,
}

pub fn judge(schema: &Schema, payload: &[u8]) -> Verdict {
    let refused = |reason, path: &str| Verdict::Refused(reason, path.to_owned());
    let Ok(text) = std::str::from_utf8(payload) else { return refused(Reason::InvalidUtf8, "$") };
    if text.trim_matches([' ', '\t', '\n', '\r']).is_empty() {
        return refused(Reason::Empty, "$");
    }
    let members = match serde_json::from_str::<Node>(text) {
        Ok(Node::Object(members)) => members,
        Ok(_) => return refused(Reason::NotAnObject, "$"),
        Err(e) if e.to_string().contains("number out of range") => return Verdict::Unknown,
        Err(e) if e.to_string().contains("recursion limit") => return refused(Reason::TooDeep, "$"),
        Err(_) => return refused(Reason::MalformedJson, "$"),
    };
    for (i, (key, _)) in members.iter().enumerate() {
        if members[..i].iter().any(|(k, _)| k == key) {
            return refused(Reason::DuplicateKey, &super::fault::path_to(key));
        }
    }
    let mut row: Vec<Option<Cell>> = schema.object.fields.iter().map(|_| None).collect();
    for (key, value) in &members {
        let path = super::fault::path_to(key);
        let Some(index) = schema.object.fields.iter().position(|f| f.name == *key) else {
            if schema.object.closed {
                return refused(Reason::UnknownField, &path);
            }
            continue;
        };
        match cell(&schema.object.fields[index], value) {
            Some(Ok(cell)) => row[index] = Some(cell),
            Some(Err(reason)) => return refused(reason, &path),
            None => return Verdict::Unknown,
        }
    }
    for (field, cell) in schema.object.fields.iter().zip(&row) {
        if cell.is_none() && field.required {
            return refused(Reason::MissingField, &super::fault::path_to(&field.name));
        }
    }
    Verdict::Row(row.into_iter().map(|cell| cell.unwrap_or(Cell::Null)).collect())
}

/// None where serde_json has lost digits.
fn cell(field: &Field, value: &Node) -> Option<Result<Cell, Reason>> {
    let listed = |found: bool| if found { Ok(()) } else { Err(Reason::NotInEnum) };
    Some(match (&field.value, value) {
        (_, Node::Null) if field.accepts_null => Ok(Cell::Null),
        (ValueType::Boolean(t), Node::Bool(b)) => {
            listed(t.only.as_ref().is_none_or(|only| only.contains(b))).map(|()| Cell::Boolean(*b))
        }
        (ValueType::Integer(t), Node::Number(n)) => {
            let n = match (n.as_i64(), n.as_f64()) {
                (Some(n), _) => n,
                (None, Some(f)) if f.abs() > 2f64.powi(53) => return None,
                (None, Some(f)) if f.fract() != 0.0 => return Some(Err(Reason::WrongType)),
                (None, Some(f)) => f as i64,
                _ => return None,
            };
            if n < t.fits.0 || n > t.fits.1 {
                Err(Reason::NumberOutOfRange)
            } else if t.only.as_ref().is_some_and(|only| !only.contains(&n)) {
                Err(Reason::NotInEnum)
            } else if n < t.min || n > t.max {
                Err(Reason::OutOfRange)
            } else {
                Ok(Cell::Integer(n))
            }
        }
        (ValueType::Number(t), Node::Number(n)) => {
            let n = n.as_f64()?;
            if t.only.as_ref().is_some_and(|only| !only.contains(&n)) {
                Err(Reason::NotInEnum)
            } else if n < t.min || n > t.max {
                Err(Reason::OutOfRange)
            } else {
                Ok(Cell::Number(n.to_bits()))
            }
        }
        (ValueType::Text(t), Node::String(s)) => {
            let chars = s.chars().count();
            if t.only.as_ref().is_some_and(|only| !only.sorted().contains(s)) {
                Err(Reason::NotInEnum)
            } else if chars < t.min_chars || chars > t.max_chars {
                Err(Reason::BadLength)
            } else {
                let cell = match t.format {
                    TextFormat::Plain => Some(Cell::Text(s.clone())),
                    TextFormat::Uuid => {
                        let groups: Vec<&str> = s.split('-').collect();
                        let lengths: Vec<usize> = groups.iter().map(|g| g.len()).collect();
                        let hex = groups.iter().all(|g| g.chars().all(|c| c.is_ascii_hexdigit()));
                        (lengths == [8, 4, 4, 4, 12] && hex).then(|| Cell::Text(s.clone()))
                    }
                    TextFormat::DateTime => date_time(s).map(Cell::Micros),
                    TextFormat::Date => {
                        let epoch = jiff::civil::date(1970, 1, 1);
                        date(s).and_then(|d| epoch.until(d).ok()).map(|span| Cell::Days(span.get_days()))
                    }
                    other => panic!("the reference knows no {other:?}"),
                };
                cell.ok_or(Reason::BadFormat)
            }
        }
        (ValueType::Boolean(_) | ValueType::Integer(_) | ValueType::Number(_) | ValueType::Text(_), _) => {
            Err(Reason::WrongType)
        }
        (other, _) => panic!("the reference knows no {other:?}"),
    })
}

fn number(s: &str, digits: usize) -> Option<i16> {
    (s.len() == digits && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok())?
}

fn date(s: &str) -> Option<jiff::civil::Date> {
    let [y, m, d] = s.split('-').collect::<Vec<_>>()[..] else { return None };
    jiff::civil::Date::new(number(y, 4)?, number(m, 2)? as i8, number(d, 2)? as i8).ok()
}

fn date_time(s: &str) -> Option<i64> {
    let s = s.to_ascii_uppercase();
    let (day, time) = s.split_once('T')?;
    let zone = time.find(['Z', '+', '-'])?;
    let (time, zone) = time.split_at(zone);
    let (time, fraction) = match time.split_once('.') {
        Some((time, fraction)) if !fraction.is_empty() && fraction.bytes().all(|b| b.is_ascii_digit()) => {
            (time, format!("{fraction:0<6}")[..6].parse::<i64>().ok()?)
        }
        Some(_) => return None,
        None => (time, 0),
    };
    let [h, m, sec] = time.split(':').collect::<Vec<_>>()[..] else { return None };
    let (h, m, sec) = (number(h, 2)?, number(m, 2)?, number(sec, 2)?);
    if h > 23 || m > 59 || sec > 60 {
        return None;
    }
    let offset = match zone {
        "Z" => 0,
        _ => {
            let (hours, minutes) = zone[1..].split_once(':')?;
            let (hours, minutes) = (number(hours, 2)?, number(minutes, 2)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            i64::from(hours * 60 + minutes) * if zone.starts_with('-') { -1 } else { 1 }
        }
    };
    let days = i64::from(jiff::civil::date(1970, 1, 1).until(date(day)?).ok()?.get_days());
    let minutes = days * 1440 + i64::from(h) * 60 + i64::from(m) - offset;
    match sec {
        60 if minutes.rem_euclid(1440) == 1439 => Some(minutes * 60_000_000 + 59_999_999),
        60 => None,
        _ => Some((minutes * 60 + i64::from(sec)) * 1_000_000 + fraction),
    }
}
