//! `pattern` is an ECMA 262 expression. Those whose meaning is the same in the `regex` crate, once the classes are
//! spelled out, are checked by the decoder; for any other (look-around, back-references, properties) None is given.

use regex::{Regex, RegexBuilder};

/// A pattern may be compiled to this much, so that no schema document fills the memory.
const SIZE_LIMIT: usize = 1 << 20;

pub fn translate(pattern: &str) -> Option<Regex> {
    let mut out = String::with_capacity(pattern.len() + 16);
    let mut chars = pattern.chars().peekable();
    let mut in_class = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' => match (chars.next()?, in_class) {
                ('d', false) => out.push_str("[0-9]"),
                ('d', true) => out.push_str("0-9"),
                ('w', false) => out.push_str("[0-9A-Za-z_]"),
                ('w', true) => out.push_str("0-9A-Za-z_"),
                (c, _) if c.is_ascii_punctuation() => {
                    out.push('\\');
                    out.push(c);
                }
                _ => return None,
            },
            // Sets of sets are the regex crate's own, and so is the meaning of a doubled operator.
            '[' | '&' | '~' if in_class => return None,
            '-' if in_class && chars.peek() == Some(&'-') => return None,
            '[' => {
                in_class = true;
                out.push('[');
                if chars.peek() == Some(&'^') {
                    out.push('^');
                    chars.next();
                }
                // `[]` is the empty class in one and a class that begins with a bracket in the other.
                if matches!(chars.peek(), Some(']' | '-')) {
                    return None;
                }
            }
            ']' if in_class => {
                in_class = false;
                out.push(']');
            }
            ']' | '}' if !in_class && !out.contains('{') => return None,
            '(' if !in_class && chars.peek() == Some(&'?') => {
                chars.next();
                if chars.next() != Some(':') {
                    return None;
                }
                out.push_str("(?:");
            }
            '.' if !in_class => out.push_str("[^\\n\\r\\x{2028}\\x{2029}]"),
            '{' if !in_class && !matches!(chars.peek(), Some('0'..='9')) => return None,
            c if c.is_ascii() || c.is_alphanumeric() => out.push(c),
            _ => return None,
        }
    }
    RegexBuilder::new(&out).size_limit(SIZE_LIMIT).dfa_size_limit(SIZE_LIMIT).build().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_those_of_ecma() {
        let matches = |pattern: &str, text: &str| translate(pattern).unwrap().is_match(text);
        assert!(matches(r"^[A-Z]{2}-\d{4}$", "AB-0123"));
        assert!(!matches(r"^\d$", "\u{0967}"));
        assert!(!matches(r"^[\w.]+$", "é"));
        assert!(!matches("^a$", "a\n"));
        assert!(!matches("^.$", "\u{2028}") && matches("^.$", "\u{85}"));
        assert!(matches(r"^(?:a|b)+\.c$", "ab.c"));
        assert!(matches("ell", "hello"));
    }

    #[test]
    fn what_differs_is_left_to_the_validator() {
        for pattern in [
            r"(?=a)b", r"(?<!a)b", r"(a)\1", r"\s", r"\bfoo", r"\p{L}", r"[a&&b]", "[]a]", "[^]", r"\cA", "a{,2}",
            "(?i)a", r"\u0041", "a{1", "]",
        ] {
            assert!(translate(pattern).is_none(), "{pattern}");
        }
    }
}
