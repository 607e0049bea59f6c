//! The format of a state file, delta and run alike (version 2). Little-endian, everything aligned to 64 bytes:
//!
//! ```text
//! "FLOESTAT" and zeros up to byte 64
//! section*: message length u64  data length u64  message, padded  data, padded
//! entry*:   query u32  shard bits u16  shard prefix u16  unit i64  end i64 (µs)  groups u64  offset u64  length u64  crc32 u32  0 u32
//! trailer:  "FLOESTAT"  version u32  0 u32  offset of the entries u64  entries u64  length of the file u64  crc32 u32  0 u32
//! ```
//!
//! Message and data are an Arrow IPC record batch: the keys, then the states of the aggregates. Its schema is not in the
//! file, nor what `query` is: the commit log gives every window query a number ([`Numbers`]). An entry stands for one section or for several of one unit
//! and shard; entries are ordered by query and unit, and sections of one unit merge in file order. The trailer's checksum
//! is over entries and trailer, an entry's over its sections, so that every byte that is read is checked and any part can be
//! read alone.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use arrow::ipc::reader::read_record_batch;
use arrow::ipc::root_as_message;
use arrow::ipc::writer::{DictionaryTracker, EncodedData, IpcDataGenerator, IpcWriteOptions};
use bytes::Bytes;

use super::groups::Partial;
use super::numbers::Numbers;
use super::query::WindowQuery;
use super::shard::Shard;
use super::{Delta, Error, Unit};
use crate::transform::sql;

const MAGIC: &[u8; 8] = b"FLOESTAT";
const VERSION: u32 = 2;
const ALIGN: usize = 64;
const SECTION_HEADER: usize = 8 + 8;
const ENTRY: usize = 4 + 2 + 2 + 8 + 8 + 8 + 8 + 8 + 4 + 4;
pub(super) const TRAILER: usize = 8 + 4 + 4 + 8 + 8 + 8 + 4 + 4;

/// Where sections of one unit and shard are in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub unit: Unit,
    pub shard: Shard,
    /// A watermark beyond it makes the sections superfluous.
    pub end_us: i64,
    /// At most: sections of one entry may have groups in common.
    pub groups: u64,
    pub offset: u64,
    pub length: u64,
    pub crc32: u32,
}

/// What a file holds, and where.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub entries: Vec<Entry>,
    /// The trailer's checksum, by which the commit log knows the file.
    pub crc32: u32,
}

impl Index {
    /// The entries of the units from `first` to `last`.
    pub fn between(&self, first: Unit, last: Unit) -> &[Entry] {
        let from = self.entries.partition_point(|e| e.unit < first);
        let to = self.entries.partition_point(|e| e.unit <= last);
        self.entries.get(from..to).unwrap_or_default()
    }
}

/// Partial aggregates of one unit, encoded.
pub(super) struct Section {
    unit: Unit,
    shard: Shard,
    end_us: i64,
    groups: usize,
    encoded: EncodedData,
}

impl Section {
    pub fn encode(
        query: &WindowQuery,
        unit: Unit,
        shard: Shard,
        end_us: i64,
        partial: &Partial,
    ) -> Result<Section, Error> {
        let columns = partial.keys.iter().chain(&partial.states).cloned().collect();
        let encode = || {
            let batch = sql::batch_of(query.state_schema().clone(), columns, partial.groups)?;
            let mut dictionaries = DictionaryTracker::new(false);
            let options = IpcWriteOptions::default();
            let generator = IpcDataGenerator::default();
            generator.encode(&batch, &mut dictionaries, &options, &mut Default::default())
        };
        let (_, encoded) = encode().map_err(|e| query.error(&e.into()))?;
        Ok(Section { unit, shard, end_us, groups: partial.groups, encoded })
    }
}

/// A file in the making.
pub(super) struct Builder {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl Builder {
    pub fn new() -> Builder {
        let mut bytes = MAGIC.to_vec();
        pad(&mut bytes);
        Builder { bytes, entries: Vec::new() }
    }

    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Sections come by query and unit.
    pub fn push(&mut self, section: &Section) {
        let offset = self.len();
        let EncodedData { ipc_message, arrow_data } = &section.encoded;
        self.bytes.extend_from_slice(&(ipc_message.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(&(arrow_data.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(ipc_message);
        pad(&mut self.bytes);
        self.bytes.extend_from_slice(arrow_data);
        pad(&mut self.bytes);
        let length = self.len() - offset;
        let Section { unit, shard, end_us, groups, .. } = *section;
        match self.entries.last_mut() {
            Some(last) if last.unit == unit && last.shard == shard => {
                last.groups += groups as u64;
                last.length += length;
            }
            _ => self.entries.push(Entry { unit, shard, end_us, groups: groups as u64, offset, length, crc32: 0 }),
        }
    }

    /// Takes over what another file holds, as it is.
    pub fn copy(&mut self, entry: &Entry, sections: &[u8]) {
        let offset = self.len();
        self.bytes.extend_from_slice(sections);
        self.entries.push(Entry { offset, ..*entry });
    }

    pub fn finish(self, numbers: &Numbers) -> Delta {
        let Builder { mut bytes, mut entries } = self;
        for entry in &mut entries {
            let sections = (entry.offset as usize)..((entry.offset + entry.length) as usize);
            entry.crc32 = bytes.get(sections).map_or(0, crc32fast::hash);
        }
        let at = bytes.len();
        for entry in &entries {
            bytes.extend_from_slice(&numbers.number(entry.unit.query).to_le_bytes());
            bytes.extend_from_slice(&u16::from(entry.shard.bits).to_le_bytes());
            bytes.extend_from_slice(&entry.shard.prefix.to_le_bytes());
            bytes.extend_from_slice(&entry.unit.key.to_le_bytes());
            bytes.extend_from_slice(&entry.end_us.to_le_bytes());
            for number in [entry.groups, entry.offset, entry.length, u64::from(entry.crc32)] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        let length = (bytes.len() + TRAILER) as u64;
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
        for number in [at as u64, entries.len() as u64, length] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let crc32 = bytes.get(at..).map_or(0, crc32fast::hash);
        bytes.extend_from_slice(&u64::from(crc32).to_le_bytes());
        Delta {
            bytes,
            max_window_end_us: entries.iter().map(|e| e.end_us).max(),
            groups: entries.iter().map(|e| e.groups).sum(),
            index: Arc::new(Index { entries, crc32 }),
        }
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
}

/// What the trailer of a file says, once `tail`, its last bytes, has been found to hold it.
pub(super) struct Trailer {
    /// Where the entries begin: the tail has to reach back to it for [`Trailer::index`].
    pub entries_at: u64,
    entries: u64,
    length: u64,
    crc32: u32,
}

/// `file` is its name, for messages.
pub(super) fn trailer(file: &str, tail: &[u8]) -> Result<Trailer, Error> {
    let damaged = |problem: &str| Error::Damaged { file: file.to_string(), problem: problem.to_string() };
    let Some((_, trailer)) = tail.split_at_checked(tail.len().wrapping_sub(TRAILER)) else {
        return Err(damaged("it is shorter than the end of a state file"));
    };
    let mut reader = Reader { rest: trailer };
    if reader.take(8) != Some(MAGIC.as_slice()) {
        return Err(damaged(
            "it does not end as a state file of format version 2 does: it is cut short or overwritten, or an earlier \
             version of Floe wrote it, which then has to finish the query's open windows",
        ));
    }
    let ends = "it ends within its last bytes";
    let version = reader.u32().ok_or_else(|| damaged(ends))?;
    reader.u32().ok_or_else(|| damaged(ends))?;
    let [entries_at, entries, length, crc32] = reader.u64s().ok_or_else(|| damaged(ends))?;
    if version != VERSION {
        return Err(damaged(&format!("it has format version {version}, this program reads {VERSION}")));
    }
    let Ok(crc32) = u32::try_from(crc32) else { return Err(damaged("its last bytes are not zero")) };
    Ok(Trailer { entries_at, entries, length, crc32 })
}

impl Trailer {
    /// Checks entries and trailer, with `tail` from [`Trailer::entries_at`] to the end of the file.
    pub fn index(&self, numbers: &Numbers, file: &str, tail: &[u8], size: u64) -> Result<Index, Error> {
        let damaged = |problem: String| Error::Damaged { file: file.to_string(), problem };
        if self.length != size {
            return Err(damaged(format!("it has {size} bytes and should have {}", self.length)));
        }
        let checked = tail.get(..tail.len().saturating_sub(8)).unwrap_or_default();
        let computed = crc32fast::hash(checked);
        if computed != self.crc32 {
            return Err(damaged(format!("the checksum of its index does not match (computed {computed:08x})")));
        }
        let mut reader = Reader { rest: tail.get(..tail.len().saturating_sub(TRAILER)).unwrap_or_default() };
        let mut entries = Vec::with_capacity(reader.rest.len() / ENTRY);
        let mut found = 0;
        while let Some(mut entry) = reader.entry() {
            found += 1;
            // State whose window was taken out, or became another one, is nobody's.
            let Some(query) = numbers.query(entry.unit.query) else { continue };
            entry.unit.query = query;
            entries.push(entry);
        }
        if !reader.rest.is_empty() || found != self.entries {
            return Err(damaged(format!("it has {found} entries and should have {}", self.entries)));
        }
        // The queries may have another order than when the file was written; sections of one unit keep theirs.
        entries.sort_by_key(|entry| entry.unit);
        Ok(Index { entries, crc32: self.crc32 })
    }
}

/// The sections of one entry, as they were written.
#[derive(Clone)]
pub(super) struct Sections {
    pub entry: Entry,
    bytes: Bytes,
}

impl Sections {
    /// Checks the bytes.
    pub fn new(query: &WindowQuery, file: &str, entry: Entry, bytes: Bytes) -> Result<Sections, Error> {
        let computed = crc32fast::hash(&bytes);
        if bytes.len() as u64 != entry.length || computed != entry.crc32 {
            let problem =
                format!("the checksum of {} does not match (computed {computed:08x})", entry.unit.show(query));
            return Err(Error::Damaged { file: file.to_string(), problem });
        }
        Ok(Sections { entry, bytes })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Decodes one section after another.
    pub fn decode(&self, query: &WindowQuery, mut each: impl FnMut(Partial) -> Result<(), Error>) -> Result<(), Error> {
        // The checksum is right, so this is not the disk's doing.
        let wrong = |what: String| Error::Undecodable { table: query.table().to_string(), what };
        let data = Buffer::from(self.bytes.clone());
        let mut at = 0;
        while at < data.len() {
            let mut reader = Reader { rest: data.get(at..).unwrap_or_default() };
            let [message_len, data_len] = reader.u64s().ok_or_else(|| wrong("a section ends too early".into()))?;
            let message_at = at + SECTION_HEADER;
            let data_at = (message_at + message_len as usize).next_multiple_of(ALIGN);
            let end = data_at + data_len as usize;
            let (Some(message), true) = (data.get(message_at..message_at + message_len as usize), end <= data.len())
            else {
                return Err(wrong("a section ends too early".into()));
            };
            let message = root_as_message(message).map_err(|e| wrong(e.to_string()))?;
            let header = message.header_as_record_batch().ok_or_else(|| wrong("it is no record batch".into()))?;
            let body = data.slice_with_length(data_at, data_len as usize);
            let schema = Arc::clone(query.state_schema());
            let batch: RecordBatch =
                read_record_batch(&body, header, schema, &HashMap::new(), None, &message.version())
                    .map_err(|e| wrong(e.to_string()))?;
            let (keys, states) = batch.columns().split_at(query.state_keys());
            each(Partial { groups: batch.num_rows(), keys: keys.to_vec(), states: states.to_vec() })?;
            at = end.next_multiple_of(ALIGN);
        }
        Ok(())
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64s<const N: usize>(&mut self) -> Option<[u64; N]> {
        let mut numbers = [0; N];
        for number in &mut numbers {
            *number = u64::from_le_bytes(self.array()?);
        }
        Some(numbers)
    }

    fn entry(&mut self) -> Option<Entry> {
        let mut reader = Reader { rest: self.rest.get(..ENTRY)? };
        let query = reader.u32()?;
        let bits = u8::try_from(u16::from_le_bytes(reader.array()?)).ok()?;
        let prefix = u16::from_le_bytes(reader.array()?);
        let key = i64::from_le_bytes(reader.array()?);
        let end_us = i64::from_le_bytes(reader.array()?);
        let [groups, offset, length, crc32] = reader.u64s()?;
        self.take(ENTRY)?;
        let shard = Shard { bits, prefix };
        Some(Entry { unit: Unit { query, key }, shard, end_us, groups, offset, length, crc32: crc32 as u32 })
    }
}
