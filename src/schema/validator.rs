//! The `jsonschema` crate over the whole document: for the keywords that [`crate::decode`] does not check itself.
//!
//! Formats assert. No reference leaves the document: there is no file or network access.

use std::fmt;

use jsonschema::{Draft, PatternOptions};
use serde_json::Value;

/// Formats that only the decoder knows, as they are about columns.
pub const OWN_FORMATS: [&str; 9] =
    ["int32", "int64", "float", "double", "decimal", "local-date-time", "date-time-local", "local-time", "time-local"];
/// Characters of a message.
const SHOWN: usize = 200;
/// Steps that one match may take: some expressions take exponentially many, and nobody chooses their texts.
const BACKTRACK_LIMIT: usize = 100_000;

pub struct Validator(jsonschema::Validator);

impl Validator {
    pub fn new(document: &str) -> Result<Validator, String> {
        let document: Value =
            serde_json::from_str(document).map_err(|e| format!("the schema document is not valid JSON: {e}"))?;
        let mut options = jsonschema::options()
            .with_draft(Draft::Draft202012)
            .should_validate_formats(true)
            .should_ignore_unknown_formats(false)
            .with_pattern_options(PatternOptions::fancy_regex().backtrack_limit(BACKTRACK_LIMIT));
        for format in OWN_FORMATS {
            options = options.with_format(format, |_: &str| true);
        }
        match options.build(&document) {
            Ok(validator) => Ok(Validator(validator)),
            Err(e) => {
                let place = e.instance_path().as_str();
                let place = if place.is_empty() { "/" } else { place };
                Err(format!("{place}: the schema document is no JSON Schema of draft 2020-12: {}", shorten(&e)))
            }
        }
    }

    /// Whether the crate has a check for a format.
    pub fn knows_format(name: &str) -> bool {
        jsonschema::options().is_known_format(Draft::Draft202012, name)
    }

    /// JSON pointer to what is wrong, and the message.
    pub fn check(&self, document: &Value) -> Result<(), (String, String)> {
        // Most documents are valid, which is found out several times faster without collecting errors.
        if self.0.is_valid(document) {
            return Ok(());
        }
        match self.0.validate(document) {
            Ok(()) => Ok(()),
            Err(e) => Err((e.instance_path().as_str().to_owned(), shorten(&e))),
        }
    }
}

impl fmt::Debug for Validator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Validator")
    }
}

/// The message ends with what is wanted and begins with the value, which may be long.
fn shorten(error: &impl fmt::Display) -> String {
    let text = error.to_string();
    let count = text.chars().count();
    if count <= SHOWN {
        return text;
    }
    let head: String = text.chars().take(SHOWN / 2).collect();
    let tail: String = text.chars().skip(count - SHOWN / 2).collect();
    format!("{head}…{tail}")
}
