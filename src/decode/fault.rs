//! What is wrong with a record, and how it is told: the value that was found, shortened, and what is allowed.

use std::borrow::Cow;
use std::collections::HashSet;

use serde_json::Value;

use crate::dead_letter::Reason;
use crate::schema::Field;

use super::scan::Scanner;

/// A refusal before it has the number of its record. Boxed, so that the way of valid records stays narrow.
#[derive(Debug)]
pub struct Fault {
    pub reason: Reason,
    pub path: Cow<'static, str>,
    pub message: Cow<'static, str>,
}

pub type Scan<T> = Result<T, Box<Fault>>;

/// Characters of a value or a key that a message shows.
const SHOWN: usize = 60;

impl Fault {
    pub fn new(
        reason: Reason,
        path: impl Into<Cow<'static, str>>,
        message: impl Into<Cow<'static, str>>,
    ) -> Box<Fault> {
        Box::new(Fault { reason, path: path.into(), message: message.into() })
    }

    /// The value that begins at byte `at` is not what the field allows. The path begins at the value.
    #[cold]
    pub fn value(reason: Reason, field: &Field, text: &[u8], at: usize) -> Box<Fault> {
        let mut scanner = Scanner::new(text);
        scanner.at = at;
        // Whether the rest is JSON at all is for `most_basic` to say.
        let end = if scanner.skip_value(1).is_ok() { scanner.at } else { text.len() };
        let found = String::from_utf8_lossy(text.get(at..end).unwrap_or_default());
        let found = shorten(&found);
        Fault::new(reason, "$", format!("found {found}; allowed is {}", field.allowed))
    }

    /// The fault as seen from outside of the member or element that `step` (`.name`, `[3]`) leads to.
    #[cold]
    pub fn within(mut self: Box<Fault>, step: &str) -> Box<Fault> {
        self.path = format!("${step}{}", self.path.strip_prefix('$').unwrap_or_default()).into();
        self
    }

    /// What the validator of the whole document says; `pointer` is a JSON pointer into `document`.
    #[cold]
    pub fn violation(document: &Value, pointer: &str, message: String) -> Box<Fault> {
        let mut path = "$".to_owned();
        let mut value = Some(document);
        for part in pointer.split('/').skip(1) {
            let part = part.replace("~1", "/").replace("~0", "~");
            if let Some(Value::Array(items)) = value {
                path.push_str(&format!("[{part}]"));
                value = part.parse::<usize>().ok().and_then(|i| items.get(i));
            } else {
                path.push_str(&step_to(&part));
                value = value.and_then(|value| value.get(&part));
            }
        }
        Fault::new(Reason::SchemaViolation, path, message)
    }

    #[cold]
    pub fn missing(field: &Field) -> Box<Fault> {
        let message = format!("required and not there; allowed is {}", field.allowed);
        Fault::new(Reason::MissingField, path_to(&field.name), message)
    }

    #[cold]
    pub fn duplicate(key: &[u8]) -> Box<Fault> {
        let key = String::from_utf8_lossy(key);
        let message = format!("the key {} is given twice", shorten(&format!("{key:?}")));
        Fault::new(Reason::DuplicateKey, path_to(&key), message)
    }

    #[cold]
    pub fn unknown(key: &[u8]) -> Box<Fault> {
        let key = String::from_utf8_lossy(key);
        let message = format!(
            "the key {} is not in the schema, which allows no others (additionalProperties: false)",
            shorten(&format!("{key:?}"))
        );
        Fault::new(Reason::UnknownField, path_to(&key), message)
    }

    /// Which fault to report of a record that has several: what is wrong with it as JSON comes before what is wrong
    /// with it as an object, and that before what the schema says, wherever in the document each of them stands.
    #[cold]
    pub fn most_basic(self: Box<Fault>, text: &[u8]) -> Box<Fault> {
        if text.iter().all(|b| matches!(b, b' ' | b'\t' | b'\n' | b'\r')) {
            return Fault::new(Reason::Empty, "$", "the value is empty");
        }
        let mut scanner = Scanner::new(text);
        scanner.skip_whitespace();
        let begin = scanner.at;
        let first = scanner.peek();
        let syntax = scanner.skip_value(0).and_then(|()| {
            let end = scanner.at;
            scanner.end().map(|()| end)
        });
        match (syntax, first) {
            (Err(mut fault), Some(0)) => {
                fault.message = "the payload begins with a zero byte, as records in a schema registry's framing do; \
                                 expected plain JSON"
                    .into();
                fault
            }
            (Err(mut fault), _) if text.starts_with(b"\xef\xbb\xbf") => {
                fault.message = "the payload begins with a byte order mark; JSON has none".into();
                fault
            }
            (Err(fault), _) => fault,
            (Ok(_), Some(b'{')) => first_duplicate(text).unwrap_or(self),
            (Ok(end), _) => {
                let found = String::from_utf8_lossy(text.get(begin..end).unwrap_or_default());
                let found = shorten(&found);
                Fault::new(Reason::NotAnObject, "$", format!("found {found}; allowed is an object"))
            }
        }
    }
}

/// The first key of the document's object that was there before. The document is known to be well-formed.
fn first_duplicate(text: &[u8]) -> Option<Box<Fault>> {
    let mut scanner = Scanner::new(text);
    let mut seen: HashSet<Vec<u8>> = HashSet::new();
    scanner.skip_whitespace();
    loop {
        // Past '{' or ','.
        scanner.at += 1;
        scanner.skip_whitespace();
        if scanner.peek() != Some(b'"') {
            return None;
        }
        let mut scratch = Vec::new();
        let key = scanner.string(&mut scratch).ok()?.to_vec();
        if seen.contains(&key) {
            return Some(Fault::duplicate(&key));
        }
        seen.insert(key);
        scanner.colon().ok()?;
        scanner.skip_value(1).ok()?;
        scanner.skip_whitespace();
        if scanner.peek() != Some(b',') {
            return None;
        }
    }
}

/// `$.name`, or `$['na me']` where the name is no identifier.
pub fn path_to(name: &str) -> String {
    format!("${}", step_to(name))
}

/// `.name`, or `['na me']`.
pub fn step_to(name: &str) -> String {
    let identifier = |name: &str| {
        !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.chars().all(|c| c.is_alphanumeric() || c == '_')
    };
    let short = shorten(name);
    if identifier(name) {
        format!(".{short}")
    } else {
        format!("['{}']", short.replace('\\', "\\\\").replace('\'', "\\'"))
    }
}

pub fn shorten(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(SHOWN) {
        Some((cut, _)) => Cow::Owned(format!("{}…", &text[..cut])),
        None => Cow::Borrowed(text),
    }
}
