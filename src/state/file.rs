//! The format of a state file, delta and run alike. Little-endian:
//!
//! ```text
//! magic "FLOESTAT"  version u32  fingerprint u32  length u64 of the whole file
//! section*: query u32  window start i64 (µs)  groups u64  message length u32  data length u64  message  data
//! crc32 u32 of everything before it
//! ```
//!
//! Message and data are an Arrow IPC record batch: the keys, then the states of the aggregates. Its schema is not in the
//! file: the fingerprint says which window queries it belongs to. Several sections of one window merge in file order.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use arrow::ipc::reader::read_record_batch;
use arrow::ipc::root_as_message;
use arrow::ipc::writer::{DictionaryTracker, EncodedData, IpcDataGenerator, IpcWriteOptions};

use super::groups::Partial;
use super::query::{WindowQuery, fingerprint};
use super::{Delta, Error};
use crate::transform::sql;

const MAGIC: &[u8; 8] = b"FLOESTAT";
const VERSION: u32 = 1;
const HEADER: usize = 8 + 4 + 4 + 8;
const SECTION_HEADER: usize = 4 + 8 + 8 + 4 + 8;
const TRAILER: usize = 4;

/// The partial aggregates of one window, encoded.
pub(super) struct Section {
    query: usize,
    start_us: i64,
    groups: usize,
    encoded: EncodedData,
}

impl Section {
    pub fn encode(query: &WindowQuery, index: usize, start_us: i64, partial: &Partial) -> Result<Section, Error> {
        let columns = partial.keys.iter().chain(&partial.states).cloned().collect();
        let encode = || {
            let batch = sql::batch_of(query.state_schema().clone(), columns, partial.groups)?;
            let mut dictionaries = DictionaryTracker::new(false);
            let options = IpcWriteOptions::default();
            let generator = IpcDataGenerator::default();
            generator.encode(&batch, &mut dictionaries, &options, &mut Default::default())
        };
        let (_, encoded) = encode().map_err(|e| query.error(&e.into()))?;
        Ok(Section { query: index, start_us, groups: partial.groups, encoded })
    }
}

/// Puts sections together, in their order.
pub(super) fn encode(queries: &[WindowQuery], sections: Vec<Section>) -> Delta {
    let body = |s: &Section| SECTION_HEADER + s.encoded.ipc_message.len() + s.encoded.arrow_data.len();
    let length = HEADER + sections.iter().map(body).sum::<usize>() + TRAILER;
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&fingerprint(queries).to_le_bytes());
    bytes.extend_from_slice(&(length as u64).to_le_bytes());
    let mut max_window_end_us = None;
    let mut groups = 0;
    for section in sections {
        let EncodedData { ipc_message, arrow_data } = section.encoded;
        bytes.extend_from_slice(&(section.query as u32).to_le_bytes());
        bytes.extend_from_slice(&section.start_us.to_le_bytes());
        bytes.extend_from_slice(&(section.groups as u64).to_le_bytes());
        bytes.extend_from_slice(&(ipc_message.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(arrow_data.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&ipc_message);
        bytes.extend_from_slice(&arrow_data);
        groups += section.groups as u64;
        let end_us = queries.get(section.query).map(|query| query.windowing().end(section.start_us));
        max_window_end_us = max_window_end_us.max(end_us);
    }
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    Delta { bytes, max_window_end_us, groups }
}

/// A section in the bytes of a file.
pub(super) struct SectionView<'a> {
    pub query: usize,
    pub start_us: i64,
    groups: usize,
    message: &'a [u8],
    data: &'a [u8],
}

/// Checks a file as a whole, then gives its sections.
pub(super) fn sections<'a>(queries: &[WindowQuery], file: &'a [u8]) -> Result<Vec<SectionView<'a>>, Error> {
    let size = file.len();
    let mut reader = Reader { rest: file };
    if reader.take(8, "its header")? != MAGIC {
        return Err(Error::Damaged("it does not begin as a state file does".to_string()));
    }
    let version = u32::from_le_bytes(reader.array("its header")?);
    let found = u32::from_le_bytes(reader.array("its header")?);
    let length = u64::from_le_bytes(reader.array("its header")?);
    if length != size as u64 {
        return Err(Error::Damaged(format!("it has {size} bytes and should have {length}")));
    }
    let Some((body, trailer)) = file.split_at_checked(size.saturating_sub(TRAILER)) else {
        return Err(Error::Damaged("it ends within its header".to_string()));
    };
    let computed = crc32fast::hash(body);
    if computed.to_le_bytes() != trailer {
        return Err(Error::Damaged(format!("its checksum does not match its {size} bytes (computed {computed:08x})")));
    }
    if version != VERSION {
        return Err(Error::Damaged(format!("it has format version {version}, this program reads {VERSION}")));
    }
    let expected = fingerprint(queries);
    if found != expected {
        return Err(Error::OtherQueries { found, expected });
    }
    let mut reader = Reader { rest: body.get(HEADER..).unwrap_or_default() };
    let mut sections = Vec::new();
    while !reader.rest.is_empty() {
        let what = "a section header";
        let query = u32::from_le_bytes(reader.array(what)?) as usize;
        let start_us = i64::from_le_bytes(reader.array(what)?);
        let groups = u64::from_le_bytes(reader.array(what)?) as usize;
        let message = u32::from_le_bytes(reader.array(what)?) as usize;
        let data = u64::from_le_bytes(reader.array(what)?) as usize;
        let message = reader.take(message, "a section")?;
        let data = reader.take(data, "a section")?;
        sections.push(SectionView { query, start_us, groups, message, data });
    }
    Ok(sections)
}

impl SectionView<'_> {
    pub fn decode(&self, query: &WindowQuery) -> Result<Partial, Error> {
        let damaged =
            |what: String| Error::Damaged(format!("window {} of table {}: {what}", self.start_us, query.table()));
        let message = root_as_message(self.message).map_err(|e| damaged(e.to_string()))?;
        let header = message.header_as_record_batch().ok_or_else(|| damaged("it holds no record batch".to_string()))?;
        let data = Buffer::from(self.data);
        let schema = Arc::clone(query.state_schema());
        let batch: RecordBatch = read_record_batch(&data, header, schema, &HashMap::new(), None, &message.version())
            .map_err(|e| damaged(e.to_string()))?;
        if batch.num_rows() != self.groups {
            return Err(damaged(format!("it has {} groups and should have {}", batch.num_rows(), self.groups)));
        }
        let (keys, states) = batch.columns().split_at(query.key_schema().fields().len());
        Ok(Partial { groups: self.groups, keys: keys.to_vec(), states: states.to_vec() })
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], Error> {
        let Some((taken, rest)) = self.rest.split_at_checked(len) else {
            return Err(Error::Damaged(format!("it ends within {what}")));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        self.take(N, what)?.try_into().map_err(|_| Error::Damaged(format!("it ends within {what}")))
    }
}
