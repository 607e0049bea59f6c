//! The wire format of Confluent's serializers: a zero byte, a schema id in four bytes, then the document.
//!
//! Owns: which records are framed, and the order of checks: the framing, the registry's schema of the id, the pipeline's
//! own schema. Does not own: how a document is decoded ([`Decoder`]) or where schemas come from ([`super::registry`]).
//! A document is decoded by the pipeline's schema whatever its producer's: columns are found by name, what the producer
//! does not write reads null where that is allowed. Records without framing are decoded as they are, with a registry too.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use jsonschema::Validator;
use serde_json::Value;

use super::registry::{BatchRegistry, Error, Writer};
use super::{Decoded, Decoder, Rejection};
use crate::dead_letter::Reason;
use crate::schema::Schema;
use crate::source::{Chunk, Record};

/// Magic byte and schema id.
pub(super) const LENGTH: u32 = 5;

/// Characters of a validator's message.
const SHOWN: usize = 200;

/// The schema id of a framed payload.
pub fn schema_id(payload: &[u8]) -> Option<u32> {
    match payload {
        [0, a, b, c, d, ..] => Some(u32::from_be_bytes([*a, *b, *c, *d])),
        _ => None,
    }
}

/// What a worker decodes with: payloads as they come out of Kafka, framed or not.
pub struct RecordDecoder {
    reader: Decoder,
    registry: Option<Arc<BatchRegistry>>,
    /// Asked for so far.
    writers: HashMap<u32, Writer>,
    decoders: HashMap<u32, Decoder>,
}

impl RecordDecoder {
    pub fn new(schema: Arc<Schema>, registry: Option<Arc<BatchRegistry>>) -> Self {
        RecordDecoder { reader: Decoder::new(schema), registry, writers: HashMap::new(), decoders: HashMap::new() }
    }

    /// Blocks while the registry is asked for ids not seen before. The chunk is the same afterwards.
    pub fn decode(&mut self, chunk: &mut Chunk) -> Result<Decoded, Error> {
        let Some(registry) = self.registry.clone() else {
            let mut decoded = self.reader.decode(chunk);
            // Nothing that begins with a zero byte is valid, so that those that were refused are all to look at.
            decoded.rejected.iter_mut().for_each(|rejection| hint(chunk, rejection));
            return Ok(decoded);
        };
        let ids: Vec<Option<u32>> = (0..chunk.records.len()).map(|i| chunk.value(i).and_then(schema_id)).collect();
        if ids.iter().all(Option::is_none) {
            return Ok(self.reader.decode(chunk));
        }
        let new: BTreeSet<u32> = ids.iter().flatten().filter(|id| !self.writers.contains_key(id)).copied().collect();
        if !new.is_empty() {
            self.learn(registry.writers(new)?);
        }
        Ok(self.framed(chunk, &ids))
    }

    fn learn(&mut self, writers: Vec<(u32, Writer)>) {
        for (id, writer) in writers {
            if let Writer::Compiled(schema) = &writer {
                self.decoders.insert(id, Decoder::new(schema.clone()));
            }
            self.writers.insert(id, writer);
        }
    }

    /// `ids`: of every record.
    fn framed(&mut self, chunk: &mut Chunk, ids: &[Option<u32>]) -> Decoded {
        let mut rejected = Vec::new();
        let mut accepted = Vec::with_capacity(ids.len());
        let mut by_writer: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (record, id) in (0..).zip(ids) {
            let Some(id) = *id else {
                accepted.push(record);
                continue;
            };
            match self.writers.get(&id) {
                Some(Writer::Compiled(_)) => {
                    by_writer.entry(id).or_default().push(record);
                    accepted.push(record);
                }
                Some(Writer::General(validator)) => match violation(validator, chunk.value(record as usize)) {
                    Some((path, message)) => {
                        let message = format!("by schema {id} of the registry: {message}").into();
                        let reason = Reason::SchemaViolation;
                        rejected.push(Rejection { record, reason, path: path.into(), message });
                    }
                    None => accepted.push(record),
                },
                Some(Writer::Unchecked(_)) => accepted.push(record),
                Some(Writer::OtherType(found)) => {
                    let message = format!("schema {id} of the registry is of type {found}; allowed is JSON");
                    rejected.push(reject(record, Reason::UnsupportedSchema, message));
                }
                Some(Writer::Unknown) | None => {
                    let message = format!("the registry has no schema with the id {id}");
                    rejected.push(reject(record, Reason::UnknownSchemaId, message));
                }
            }
        }
        let documents = |records: &[u32], all: &[Record]| -> Vec<Record> {
            records.iter().map(|&r| document(all[r as usize], ids[r as usize].is_some())).collect()
        };
        let mut view = Chunk { data: std::mem::take(&mut chunk.data), ..Chunk::default() };
        let mut refused = HashSet::new();
        for (id, records) in by_writer {
            let Some(decoder) = self.decoders.get_mut(&id) else { continue };
            view.records = documents(&records, &chunk.records);
            for rejection in decoder.decode(&view).rejected {
                let record = records[rejection.record as usize];
                let message = format!("by schema {id} of the registry: {}", rejection.message).into();
                refused.insert(record);
                rejected.push(Rejection { record, message, ..rejection });
            }
        }
        accepted.retain(|record| !refused.contains(record));
        view.records = documents(&accepted, &chunk.records);
        let mut decoded = self.reader.decode(&view);
        chunk.data = view.data;
        decoded.records.iter_mut().for_each(|record| *record = accepted[*record as usize]);
        let of_reader = decoded.rejected.into_iter();
        rejected.extend(of_reader.map(|r| Rejection { record: accepted[r.record as usize], ..r }));
        rejected.sort_by_key(|rejection| rejection.record);
        Decoded { rejected, ..decoded }
    }
}

/// The record without its key and its framing.
fn document(record: Record, framed: bool) -> Record {
    let key_len = if record.key_len == Record::NONE { 0 } else { record.key_len };
    let skipped = if framed { LENGTH } else { 0 };
    let value_len = if record.value_len == Record::NONE { Record::NONE } else { record.value_len - skipped };
    Record { begin: record.begin + key_len + skipped, key_len: Record::NONE, value_len, ..record }
}

/// The JSON path of the first violation and its message. What is no JSON is left to the decoder, which knows reasons.
fn violation(validator: &Validator, payload: Option<&[u8]>) -> Option<(String, String)> {
    let document: Value = serde_json::from_slice(payload?.get(LENGTH as usize..)?).ok()?;
    // Most documents are valid, which is found out several times faster without collecting errors.
    if validator.is_valid(&document) {
        return None;
    }
    let error = validator.validate(&document).err()?;
    let text = error.to_string();
    let message = match text.char_indices().nth(SHOWN) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    };
    Some((json_path(error.instance_path().as_str()), message))
}

/// `/a/0/b` to `$.a[0].b`.
fn json_path(pointer: &str) -> String {
    let mut path = "$".to_string();
    for step in pointer.split('/').skip(1) {
        let step = step.replace("~1", "/").replace("~0", "~");
        path += &if step.bytes().all(|b| b.is_ascii_digit()) { format!("[{step}]") } else { format!(".{step}") };
    }
    path
}

fn reject(record: u32, reason: Reason, message: String) -> Rejection {
    Rejection { record, reason, path: "$".into(), message: message.into() }
}

/// A whole topic of framed records is a missing setting, not a million malformed documents.
pub(super) fn hint(chunk: &Chunk, rejection: &mut Rejection) {
    if let Some(id) = chunk.value(rejection.record as usize).and_then(schema_id) {
        let message = format!(
            "the payload begins as in a schema registry's framing (schema id {id}), and no registry is configured; set \
             schema.registry"
        );
        *rejection = reject(rejection.record, Reason::SchemaRegistryFraming, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(properties: &str) -> Arc<Schema> {
        Schema::parse(&format!(r#"{{"type": "object", "required": ["a"], "properties": {{{properties}}}}}"#)).unwrap()
    }

    fn framed(id: u32, document: &str) -> Vec<u8> {
        [&[0], id.to_be_bytes().as_slice(), document.as_bytes()].concat()
    }

    fn chunk(values: &[Vec<u8>]) -> Chunk {
        let mut chunk = Chunk::default();
        for (offset, value) in (0..).zip(values) {
            let begin = chunk.data.len() as u32;
            chunk.data.extend_from_slice(b"key");
            chunk.data.extend_from_slice(value);
            let value_len = value.len() as u32;
            chunk.records.push(Record { offset, timestamp_ms: 0, begin, key_len: 3, value_len });
        }
        chunk
    }

    #[test]
    fn without_a_registry_the_framing_has_a_reason_of_its_own() {
        let mut decoder = RecordDecoder::new(schema(r#""a": {"type": "integer"}"#), None);
        let values = [framed(7, r#"{"a": 1}"#), br#"{"a": 1}"#.to_vec(), b"\0{}".to_vec(), framed(1, "")];
        let decoded = decoder.decode(&mut chunk(&values)).unwrap();
        assert_eq!(decoded.records, [1]);
        let reasons: Vec<_> = decoded.rejected.iter().map(|r| r.reason).collect();
        use Reason::{MalformedJson, SchemaRegistryFraming};
        assert_eq!(reasons, [SchemaRegistryFraming, MalformedJson, SchemaRegistryFraming]);
        assert!(decoded.rejected[0].message.contains("schema id 7"));
    }

    #[test]
    fn every_record_is_held_to_its_writer_and_to_the_reader() {
        let mut decoder = RecordDecoder::new(schema(r#""a": {"type": "integer"}, "b": {"type": "string"}"#), None);
        let one_of = serde_json::json!({"properties": {"a": {"oneOf": [{"minimum": 5}, {"minimum": 8}]}}});
        let validator = jsonschema::validator_for(&one_of).unwrap();
        decoder.learn(vec![
            (1, Writer::Compiled(schema(r#""a": {"type": "integer", "maximum": 9}"#))),
            (2, Writer::Compiled(schema(r#""a": {"type": "string"}"#))),
            (3, Writer::Unchecked("$ref".into())),
            (4, Writer::OtherType("AVRO".into())),
            (5, Writer::Unknown),
            (6, Writer::General(Arc::new(validator))),
        ]);
        let values = [
            framed(1, r#"{"a": 9}"#),
            framed(1, r#"{"a": 10}"#),
            framed(2, r#"{"a": "text"}"#),
            framed(3, r#"{"a": 10, "b": "x"}"#),
            framed(4, "\u{2}x"),
            framed(5, r#"{"a": 1}"#),
            br#"{"a": 11}"#.to_vec(),
            framed(2, r#"{"a": 1}"#),
            framed(1, ""),
            framed(6, r#"{"a": 6}"#),
            framed(6, r#"{"a": 9}"#),
            framed(6, "{"),
        ];
        let mut chunk = chunk(&values);
        let before = (chunk.data.clone(), format!("{:?}", chunk.records));
        let ids: Vec<_> = values.iter().map(|v| schema_id(v)).collect();
        let decoded = decoder.framed(&mut chunk, &ids);
        assert_eq!((chunk.data, format!("{:?}", chunk.records)), before, "the chunk is as it was");
        assert_eq!(decoded.records, [0, 3, 6, 9]);
        assert_eq!(decoded.batch.num_rows(), 4);
        let found: Vec<_> = decoded.rejected.iter().map(|r| (r.record, r.reason, &*r.path)).collect();
        let expected = [
            (1, Reason::OutOfRange, "$.a"),
            (2, Reason::WrongType, "$.a"),
            (4, Reason::UnsupportedSchema, "$"),
            (5, Reason::UnknownSchemaId, "$"),
            (7, Reason::WrongType, "$.a"),
            (8, Reason::Empty, "$"),
            (10, Reason::SchemaViolation, "$.a"),
            (11, Reason::MalformedJson, "$"),
        ];
        assert_eq!(found, expected);
        assert!(decoded.rejected[0].message.starts_with("by schema 1 of the registry: found 10"));
        assert!(!decoded.rejected[1].message.contains("registry"), "the reader's refusal");
    }
}
