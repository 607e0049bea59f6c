//! Which message type a record is of: by its topic, by a member of its document, or both.
//!
//! Owns: the conditions of `[[types]]` and their order: the first type whose conditions hold has the record. Does not own:
//! what a type's records are held to. Invariants: every record of a chunk is of one type or refused, never both; a record
//! that is no JSON object up to the member is refused for that, as its type would have refused it.

use std::borrow::Cow;

use super::fault::{Fault, Scan, shorten};
use super::framing::{LENGTH, hint, schema_id};
use super::scan::Scanner;
use super::{Rejection, readable};
use crate::dead_letter::Reason;
use crate::source::Chunk;

/// The conditions of one type, all of which have to hold. None: every record is of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct When {
    pub topic: Option<String>,
    /// Name of a member of the document and its value: the text of a string, a number or a literal as it is written.
    pub member: Option<(String, String)>,
}

impl When {
    fn takes(&self, topic: &str) -> bool {
        self.topic.as_deref().is_none_or(|of| of == topic)
    }

    /// Whether a later type with the conditions `other` could never get a record.
    pub fn shadows(&self, other: &When) -> bool {
        (self.topic.is_none() || self.topic == other.topic) && (self.member.is_none() || self.member == other.member)
    }
}

pub struct Router {
    types: Vec<When>,
    registry: bool,
}

/// The records of a chunk by type.
#[derive(Debug)]
pub enum Split {
    /// All of them are of one type, as always for the topic.
    Whole(usize),
    Parts {
        /// By type: indices of records, in order.
        records: Vec<Vec<u32>>,
        rejected: Vec<Rejection>,
    },
}

impl Router {
    /// `registry`: whether records may have a schema id in front.
    pub fn new(types: Vec<When>, registry: bool) -> Router {
        Router { types, registry }
    }

    pub fn split(&self, chunk: &Chunk) -> Split {
        let candidates: Vec<(usize, &When)> =
            self.types.iter().enumerate().filter(|(_, when)| when.takes(&chunk.topic)).collect();
        if let [(only, When { member: None, .. }), ..] = candidates.as_slice() {
            return Split::Whole(*only);
        }
        let mut records = vec![Vec::new(); self.types.len()];
        let mut rejected = Vec::new();
        let mut scratch = Vec::new();
        for record in 0..chunk.records.len() as u32 {
            match self.type_of(chunk.value(record as usize), &candidates, &mut scratch) {
                Ok(of) => records[of].push(record),
                Err(fault) => {
                    let Fault { reason, path, message } = *fault;
                    let mut rejection = Rejection { record, reason, path, message };
                    if !self.registry {
                        hint(chunk, &mut rejection);
                    }
                    rejected.push(rejection);
                }
            }
        }
        Split::Parts { records, rejected }
    }

    fn type_of(&self, payload: Option<&[u8]>, candidates: &[(usize, &When)], scratch: &mut Vec<u8>) -> Scan<usize> {
        let payload = readable(payload, false)?;
        let document = match schema_id(payload) {
            Some(_) if self.registry => payload.get(LENGTH as usize..).unwrap_or_default(),
            _ => payload,
        };
        // Mostly all types look at the same member.
        let mut last: Option<(&str, Option<Cow<'_, [u8]>>)> = None;
        for (of, when) in candidates {
            let Some((name, value)) = &when.member else { return Ok(*of) };
            if last.as_ref().is_none_or(|(of, _)| of != name) {
                let found = member(document, name.as_bytes(), scratch);
                last = Some((name, found.map_err(|fault| fault.most_basic(document))?));
            }
            if let Some((_, Some(found))) = &last
                && **found == *value.as_bytes()
            {
                return Ok(*of);
            }
        }
        Err(unknown(candidates, last).most_basic(document))
    }
}

/// `last`: the member that was looked at last, and what it was.
#[cold]
fn unknown(candidates: &[(usize, &When)], last: Option<(&str, Option<Cow<'_, [u8]>>)>) -> Box<Fault> {
    let mut allowed: Vec<String> = Vec::new();
    for (name, value) in candidates.iter().filter_map(|(_, when)| when.member.as_ref()) {
        allowed.push(format!("{name} = {value:?}"));
    }
    let allowed = if allowed.is_empty() { "other topics".to_string() } else { allowed.join(", ") };
    let (path, found) = match last {
        Some((name, Some(value))) => {
            let text = String::from_utf8_lossy(&value).into_owned();
            (super::fault::path_to(name), format!("found {}", shorten(&format!("{text:?}"))))
        }
        Some((name, None)) => (super::fault::path_to(name), format!("there is no {name}")),
        None => ("$".to_string(), "no message type takes this topic".to_string()),
    };
    Fault::new(Reason::UnknownType, path, format!("{found}; message types are told by {allowed}"))
}

/// The first member of that name of the object. What comes after it is left to the decoder.
fn member<'a>(text: &'a [u8], name: &[u8], scratch: &mut Vec<u8>) -> Scan<Option<Cow<'a, [u8]>>> {
    let mut scanner = Scanner::new(text);
    scanner.skip_whitespace();
    if scanner.peek() != Some(b'{') {
        return Err(Fault::new(Reason::NotAnObject, "$", "allowed is an object"));
    }
    scanner.at += 1;
    scanner.skip_whitespace();
    if scanner.peek() == Some(b'}') {
        return Ok(None);
    }
    loop {
        if scanner.peek() != Some(b'"') {
            return Err(scanner.malformed("a key in quotes"));
        }
        let is_it = scanner.string(scratch)? == name;
        scanner.colon()?;
        let begin = scanner.at;
        if is_it && scanner.peek() == Some(b'"') {
            return Ok(Some(Cow::Owned(scanner.string(scratch)?.to_vec())));
        }
        scanner.skip_value(1)?;
        if is_it {
            return Ok(text.get(begin..scanner.at).map(Cow::Borrowed));
        }
        scanner.skip_whitespace();
        match scanner.peek() {
            Some(b',') => scanner.at += 1,
            Some(b'}') => return Ok(None),
            _ => return Err(scanner.malformed("',' or '}'")),
        }
        scanner.skip_whitespace();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(topic: &str, values: &[Option<&[u8]>]) -> Chunk {
        let mut chunk = Chunk { topic: topic.into(), ..Chunk::default() };
        for (offset, value) in (0..).zip(values) {
            chunk.push(offset, None, Some(b"key"), *value, None);
        }
        chunk
    }

    fn when(topic: Option<&str>, member: Option<(&str, &str)>) -> When {
        When { topic: topic.map(Into::into), member: member.map(|(a, b)| (a.into(), b.into())) }
    }

    fn parts(split: Split) -> (Vec<Vec<u32>>, Vec<(u32, Reason)>) {
        match split {
            Split::Whole(of) => panic!("whole: {of}"),
            Split::Parts { records, rejected } => {
                (records, rejected.into_iter().map(|r| (r.record, r.reason)).collect())
            }
        }
    }

    #[test]
    fn a_topic_is_of_one_type_without_a_look_at_its_records() {
        let router = Router::new(vec![when(Some("a"), None), when(Some("b"), None)], false);
        let nonsense: &[Option<&[u8]>] = &[None, Some(b"{")];
        assert!(matches!(router.split(&chunk("a", nonsense)), Split::Whole(0)));
        assert!(matches!(router.split(&chunk("b", nonsense)), Split::Whole(1)));
        let (records, rejected) = parts(router.split(&chunk("c", &[Some(b"{}")])));
        assert_eq!((records, rejected), (vec![vec![], vec![]], vec![(0, Reason::UnknownType)]));
    }

    #[test]
    fn a_member_tells_types_apart_wherever_it_stands_and_however_it_is_written() {
        let router = Router::new(
            vec![
                when(None, Some(("type", "a"))),
                when(Some("t"), Some(("type", "7"))),
                when(None, Some(("kind", "b"))),
            ],
            false,
        );
        let values: Vec<Option<&[u8]>> = vec![
            Some(br#"{"type":"a"}"#),
            Some(br#" { "x" : {"type":"7"} , "ty\u0070e" : "\u0061" , "rest": [1]} "#),
            Some(br#"{"type":7}"#),
            Some(br#"{"kind":"b","type":"c"}"#),
            Some(br#"{"type":"c"}"#),
            Some(br#"{"other":1}"#),
            Some(b"{}"),
        ];
        let (records, rejected) = parts(router.split(&chunk("t", &values)));
        assert_eq!(records, [vec![0, 1], vec![2], vec![3]]);
        assert_eq!(rejected, [4, 5, 6].map(|record| (record, Reason::UnknownType)));
        let Split::Parts { rejected, .. } = router.split(&chunk("t", &values)) else { panic!() };
        assert_eq!(
            rejected[0].message,
            r#"there is no kind; message types are told by type = "a", type = "7", kind = "b""#
        );
        assert_eq!(&*rejected[1].path, "$.kind");
        let only = Router::new(vec![when(None, Some(("type", "a")))], false);
        let Split::Parts { rejected, .. } = only.split(&chunk("t", &values[4..5])) else { panic!() };
        assert_eq!(rejected[0].message, r#"found "c"; message types are told by type = "a""#);
        assert_eq!(&*rejected[0].path, "$.type");
    }

    #[test]
    fn what_is_no_document_is_refused_for_that() {
        let router = Router::new(vec![when(None, Some(("type", "a"))), when(None, Some(("type", "b")))], false);
        let values: Vec<Option<&[u8]>> = vec![
            None,
            Some(b""),
            Some(b" "),
            Some(b"[1]"),
            Some(b"{\"x\":tru"),
            Some(b"{\"type\":\"c\"} x"),
            Some(b"{\"x\":1,\"x\":2}"),
            Some(b"\xff{}"),
            Some(b"\0\0\0\0\x07{\"type\":\"a\"}"),
            Some(b"{\"type\":\"a\""),
        ];
        let (records, rejected) = parts(router.split(&chunk("t", &values)));
        use Reason::*;
        let expected = [
            (0, NullValue),
            (1, Empty),
            (2, Empty),
            (3, NotAnObject),
            (4, MalformedJson),
            (5, MalformedJson),
            (6, DuplicateKey),
            (7, InvalidUtf8),
            (8, SchemaRegistryFraming),
        ];
        assert_eq!(rejected, expected);
        assert_eq!(records, [vec![9], vec![]], "what comes after the member is the decoder's");

        let framed = Router::new(vec![when(None, Some(("type", "a"))), when(None, None)], true);
        let (records, rejected) = parts(framed.split(&chunk("t", &values[8..9])));
        assert_eq!((records, rejected), (vec![vec![0], vec![]], vec![]));
    }

    #[test]
    fn a_type_that_could_never_get_a_record_is_known() {
        let any = when(None, None);
        let a = when(Some("a"), None);
        let member = when(Some("a"), Some(("type", "x")));
        assert!(any.shadows(&a) && any.shadows(&member) && a.shadows(&member) && a.shadows(&a));
        assert!(!member.shadows(&a) && !a.shadows(&any) && !a.shadows(&when(None, Some(("type", "x")))));
    }
}
