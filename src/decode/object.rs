//! The members of an object to the columns of its fields.
//!
//! Owns: which field a key belongs to, and that no key comes twice. Invariant: a reader is of one [`ObjectType`], and its
//! columns are in the order of its fields.

use std::collections::HashSet;

use crate::schema::ObjectType;

use super::column::Column;
use super::fault::{Fault, Scan, step_to};
use super::scan::Scanner;

/// Buffers that are used again for each object of one type.
pub struct Reader {
    keys: Keys,
    unknown: KeySet,
    filled: usize,
}

impl Reader {
    pub fn new(object: &ObjectType) -> Reader {
        Reader { keys: Keys::new(object), unknown: KeySet::default(), filled: 0 }
    }

    /// Reads the object that `scanner` stands on; its members have `depth` objects and lists around them. What are no
    /// fields are appended to `extra`, each with a comma behind it.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub fn members(
        &mut self,
        object: &ObjectType,
        scanner: &mut Scanner<'_>,
        columns: &mut [Column],
        rows: usize,
        depth: u32,
        mut extra: Option<&mut Vec<u8>>,
        scratch: &mut Vec<u8>,
    ) -> Scan<()> {
        let Reader { keys, unknown, filled } = self;
        scanner.at += 1;
        scanner.skip_whitespace();
        *filled = 0;
        let mut previous = keys.start();
        unknown.clear();
        if scanner.peek() == Some(b'}') {
            scanner.at += 1;
            return Ok(());
        }
        let mut begin = scanner.at;
        let mut found = scanner.apart(|scanner| keys.read(previous, scanner, scratch))?;
        loop {
            if let Some(index) = found {
                previous = index;
                let (field, column) = (&object.fields[index], &mut columns[index]);
                if column.len() > rows {
                    return Err(Fault::duplicate(field.name.as_bytes()));
                }
                column.push(field, scanner, depth, scratch).map_err(|fault| fault.within(&step_to(&field.name)))?;
                *filled += 1;
            } else {
                if object.closed {
                    return Err(Fault::unknown(&keys.unknown));
                }
                if !unknown.insert(&keys.unknown) {
                    return Err(Fault::duplicate(&keys.unknown));
                }
                scanner.apart(|scanner| scanner.skip_value(depth))?;
                if let Some(extra) = &mut extra {
                    extra.extend_from_slice(scanner.text().get(begin..scanner.at).unwrap_or_default());
                    extra.push(b',');
                }
            }
            found = keys.follows(previous, scanner);
            if found.is_some() {
                continue;
            }
            scanner.skip_whitespace();
            match scanner.peek() {
                Some(b',') => scanner.at += 1,
                Some(b'}') => {
                    scanner.at += 1;
                    return Ok(());
                }
                _ => return Err(scanner.malformed("',' or '}'")),
            }
            scanner.skip_whitespace();
            begin = scanner.at;
            found = scanner.apart(|scanner| keys.read(previous, scanner, scratch))?;
        }
    }

    /// Nulls for the fields that were left out.
    #[inline]
    pub fn complete(&mut self, object: &ObjectType, columns: &mut [Column], rows: usize) -> Scan<()> {
        if self.filled < columns.len() {
            for (field, column) in object.fields.iter().zip(columns) {
                if column.len() == rows {
                    if field.required {
                        return Err(Fault::missing(field));
                    }
                    column.push_null();
                }
            }
        }
        Ok(())
    }
}

/// Finds the field of a key. Producers write the members of every message in the same order: the field that followed
/// the last one before is tried first, by comparing bytes of the document, without reading the key as a string.
struct Keys {
    /// By field: its name as JSON with the quotes, the colon behind it and the comma before it.
    quoted: Vec<Box<[u8]>>,
    /// By field: the one that came next; at the end an entry for the first of a document.
    next: Vec<usize>,
    /// Names with their fields, sorted.
    sorted: Vec<(String, usize)>,
    /// The last key read that is no field.
    unknown: Vec<u8>,
}

impl Keys {
    fn new(object: &ObjectType) -> Keys {
        let names = || object.fields.iter().map(|field| field.name.clone());
        let mut sorted: Vec<(String, usize)> = names().zip(0..).collect();
        sorted.sort_unstable();
        let next = (1..=sorted.len()).chain([0]).collect();
        let quoted = |name| format!(",{}:", serde_json::Value::String(name)).into_bytes().into();
        Keys { quoted: names().map(quoted).collect(), next, sorted, unknown: Vec::new() }
    }

    fn start(&self) -> usize {
        self.quoted.len()
    }

    /// The field that followed `previous` before, if `scanner` stands on the comma before it and there is no whitespace: as
    /// most producers write. Goes to the value.
    #[inline(always)]
    fn follows(&self, previous: usize, scanner: &mut Scanner<'_>) -> Option<usize> {
        let guess = self.next[previous];
        let quoted = self.quoted.get(guess)?;
        if !starts_with(scanner.rest(), quoted) {
            return None;
        }
        scanner.at += quoted.len();
        scanner.skip_whitespace();
        Some(guess)
    }

    /// The field of the key that `scanner` stands on; None if there is no such field: then the key is in `unknown`.
    /// Goes past the colon, to the value.
    #[inline(never)]
    fn read(&mut self, previous: usize, scanner: &mut Scanner<'_>, scratch: &mut Vec<u8>) -> Scan<Option<usize>> {
        let mut guess = self.next[previous];
        // Two guesses: an optional member may have been left out.
        for _ in 0..2 {
            let Some(quoted) = self.quoted.get(guess) else { break };
            if starts_with(scanner.rest(), &quoted[1..]) {
                scanner.at += quoted.len() - 1;
                scanner.skip_whitespace();
                return Ok(Some(guess));
            }
            guess = self.next[guess];
        }
        if scanner.peek() != Some(b'"') {
            return Err(scanner.malformed("a key in quotes"));
        }
        let key = scanner.string(scratch)?;
        scanner.colon()?;
        // Few names are told apart by their length, mostly.
        let position = if self.sorted.len() <= 16 {
            self.sorted.iter().position(|(name, _)| name.as_bytes() == key)
        } else {
            self.sorted.binary_search_by(|(name, _)| name.as_bytes().cmp(key)).ok()
        };
        if let Some(position) = position {
            let index = self.sorted[position].1;
            self.next[previous] = index;
            return Ok(Some(index));
        }
        self.unknown.clear();
        self.unknown.extend_from_slice(key);
        Ok(None)
    }
}

/// As `text.starts_with(key)`, a word at a time: a call for each of these short keys takes longer than to compare them.
#[inline]
fn starts_with(text: &[u8], key: &[u8]) -> bool {
    let Some(text) = text.get(..key.len()) else { return false };
    let (Some(text_end), Some(key_end)) = (text.last_chunk::<8>(), key.last_chunk::<8>()) else { return text == key };
    let word = |bytes: &[u8; 8]| u64::from_ne_bytes(*bytes);
    // The last word overlaps the one before.
    word(text_end) == word(key_end)
        && text.as_chunks().0.iter().zip(key.as_chunks().0).all(|(text, key)| word(text) == word(key))
}

/// The unknown keys of one document: the first few compared one by one, many by hash.
#[derive(Default)]
pub struct KeySet {
    few: Vec<u8>,
    ends: Vec<usize>,
    many: HashSet<Box<[u8]>>,
}

impl KeySet {
    const FEW: usize = 16;
    /// What is kept for the next document.
    const KEPT: usize = 1 << 16;

    #[inline]
    pub fn clear(&mut self) {
        if !self.ends.is_empty() {
            self.few.clear();
            self.ends.clear();
            self.few.shrink_to(KeySet::KEPT);
            if !self.many.is_empty() {
                self.many = HashSet::new();
            }
        }
    }

    /// False if the key was there before.
    pub fn insert(&mut self, key: &[u8]) -> bool {
        let mut begin = 0;
        for end in &self.ends {
            if &self.few[begin..*end] == key {
                return false;
            }
            begin = *end;
        }
        if self.ends.len() < KeySet::FEW {
            self.few.extend_from_slice(key);
            self.ends.push(self.few.len());
            return true;
        }
        self.many.insert(key.into())
    }
}
