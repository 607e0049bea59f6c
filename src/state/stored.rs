//! The state files that count, and reading units back from them.
//!
//! Owns: the index of every live file, kept in memory; which parts of which file a unit is in. Does not own: which files
//! count (the commit log does) or which units are in memory. Invariant: the sections of a unit are merged in the order of
//! the files and of the sections in them, which is the order in which they were aggregated: whoever reads a unit back gets
//! the bits that it would have in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio::runtime::Handle;

use super::file::{self, Entry, Index, Sections};
use super::groups::Partial;
use super::numbers::Numbers;
use super::query::WindowQuery;
use super::shard::{self, Shard};
use super::table::Table;
use super::{Error, Unit, closed, query_of};
use crate::checkpoint::{Checkpoint, StateFile};

/// Files that are read at the same time.
const CONCURRENT_READS: usize = 8;
/// Read at once from the end of a file: mostly its whole index.
const TAIL: u64 = 64 << 10;

/// A state file and what is in it.
#[derive(Clone, Debug)]
pub struct LiveFile {
    pub(super) file: StateFile,
    pub(super) index: Arc<Index>,
}

/// Reads state files. Its methods block, so they are for threads outside of the runtime.
#[derive(Clone)]
pub struct Reader {
    checkpoint: Arc<Checkpoint>,
    runtime: Handle,
    numbers: Numbers,
}

/// What the files have of a unit.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extent {
    pub end_us: i64,
    pub bytes: u64,
    /// At most: files may have groups in common.
    pub groups: u64,
    /// The number of the last file that has some of it.
    pub last_file: usize,
}

/// The sections of one unit, by file, in the order in which they merge.
pub(super) type Pieces = Vec<(usize, Sections)>;

/// What is read at once: several small units of one query, or a shard of one that is large.
#[derive(Clone, Debug)]
pub(super) struct Span {
    /// In order.
    pub units: Vec<Unit>,
    pub shard: Shard,
}

impl Reader {
    /// `numbers` are those of the queries that everything read is for.
    pub fn new(checkpoint: Arc<Checkpoint>, runtime: Handle, numbers: Numbers) -> Reader {
        Reader { checkpoint, runtime, numbers }
    }

    pub(super) fn numbers(&self) -> &Numbers {
        &self.numbers
    }

    pub(super) fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> Arc<Checkpoint> {
        self.checkpoint.clone()
    }

    pub(super) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    fn name(&self, file: &StateFile) -> String {
        format!("{}/{}", self.checkpoint.url(), file.name)
    }

    /// Reads the indexes of files: any that is missing, cut short or not what the commit log says is named.
    pub async fn open(&self, files: &[StateFile]) -> Result<Vec<LiveFile>, Error> {
        let open = files.iter().map(|file| self.open_one(file));
        futures::stream::iter(open).buffered(CONCURRENT_READS).try_collect().await
    }

    async fn open_one(&self, file: &StateFile) -> Result<LiveFile, Error> {
        let name = self.name(file);
        let mut tail = self.checkpoint.open_state(file, TAIL).await?;
        let trailer = file::trailer(&name, &tail)?;
        let needed = file.bytes.saturating_sub(trailer.entries_at);
        if needed > tail.len() as u64 {
            tail = self.checkpoint.open_state(file, needed).await?;
        }
        let from = tail.len().saturating_sub(needed as usize);
        let index = trailer.index(&self.numbers, &name, tail.get(from..).unwrap_or_default(), file.bytes)?;
        if index.crc32 != file.crc32 {
            let problem = "it is sound but not the file that the commit log names: the two are from different copies";
            return Err(Error::Damaged { file: name, problem: problem.to_string() });
        }
        Ok(LiveFile { file: file.clone(), index: Arc::new(index) })
    }

    /// What the files have of the units of a span, by unit. Windows that are closed have to be left out of the span.
    pub(super) fn fetch(
        &self,
        queries: &[WindowQuery],
        files: &[LiveFile],
        span: &Span,
    ) -> Result<BTreeMap<Unit, Pieces>, Error> {
        let (Some(first), Some(last)) = (span.units.first(), span.units.last()) else { return Ok(BTreeMap::new()) };
        let wanted = |entry: &&Entry| span.shard.overlaps(entry.shard) && span.units.binary_search(&entry.unit).is_ok();
        let reads = files.iter().enumerate().filter_map(|(number, live)| {
            let entries: Vec<Entry> = live.index.between(*first, *last).iter().filter(wanted).copied().collect();
            (!entries.is_empty()).then_some(async move {
                let parts = self.read(&live.file, &entries).await?;
                Ok::<_, Error>((number, entries.into_iter().zip(parts).collect::<Vec<_>>()))
            })
        });
        let reads: Vec<_> = reads.collect();
        let read = futures::stream::iter(reads).buffered(CONCURRENT_READS).try_collect::<Vec<_>>();
        let mut units: BTreeMap<Unit, Pieces> = BTreeMap::new();
        for (number, entries) in self.block_on(read)? {
            let name = files.get(number).map(|f| self.name(&f.file)).unwrap_or_default();
            for (entry, bytes) in entries {
                let sections = Sections::new(query_of(queries, entry.unit)?, &name, entry, bytes)?;
                units.entry(entry.unit).or_default().push((number, sections));
            }
        }
        Ok(units)
    }

    /// The bytes of each entry; entries that are neighbours are read as one.
    async fn read(&self, file: &StateFile, entries: &[Entry]) -> Result<Vec<Bytes>, Error> {
        let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
        for entry in entries {
            let end = entry.offset + entry.length;
            match ranges.last_mut() {
                Some(range) if range.end == entry.offset => range.end = end,
                _ => ranges.push(entry.offset..end),
            }
        }
        let parts = self.checkpoint.read_state(file, &ranges).await?;
        let mut ranges = ranges.into_iter().zip(parts).peekable();
        let mut bytes = Vec::with_capacity(entries.len());
        for entry in entries {
            while ranges.next_if(|(range, _)| range.end <= entry.offset).is_some() {}
            let part = ranges.peek().map(|(range, part)| {
                let at = (entry.offset - range.start) as usize;
                part.slice(at..at + entry.length as usize)
            });
            bytes.push(part.unwrap_or_default());
        }
        Ok(bytes)
    }
}

/// What the files have of every unit that is open.
pub(super) fn extents(files: &[LiveFile], evict_ms: i64) -> BTreeMap<Unit, Extent> {
    let mut extents: BTreeMap<Unit, Extent> = BTreeMap::new();
    for (number, live) in files.iter().enumerate() {
        for entry in live.index.entries.iter().filter(|e| !closed(e.end_us, evict_ms)) {
            // A window may end before 1970.
            let extent = extents.entry(entry.unit).or_insert(Extent { end_us: entry.end_us, ..Extent::default() });
            extent.end_us = extent.end_us.max(entry.end_us);
            extent.bytes += entry.length;
            extent.groups += entry.groups;
            extent.last_file = number;
        }
    }
    extents
}

/// An open window as the files have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredWindowStats {
    /// Index in `[[windows]]`.
    pub query: usize,
    pub start_us: i64,
    pub end_us: i64,
    /// At most: files may have groups in common.
    pub groups: u64,
    pub bytes: u64,
    pub files: u64,
}

/// Every window that is open, by query and start.
pub fn open_windows(files: &[LiveFile], evict_ms: i64) -> Vec<StoredWindowStats> {
    let stats = |(unit, extent): (Unit, Extent)| StoredWindowStats {
        query: unit.query as usize,
        start_us: unit.key,
        end_us: extent.end_us,
        groups: extent.groups,
        bytes: extent.bytes,
        files: files.iter().filter(|f| !f.index.between(unit, unit).is_empty()).count() as u64,
    };
    extents(files, evict_ms).into_iter().map(stats).collect()
}

/// Cuts units, which come in order with their bytes, into spans of about `share` bytes.
pub(super) fn spans(units: impl IntoIterator<Item = (Unit, u64)>, share: u64) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let mut filled = u64::MAX;
    for (unit, bytes) in units {
        if bytes > share {
            spans.extend(Shard::split(bytes, share).map(|shard| Span { units: vec![unit], shard }));
            filled = u64::MAX;
            continue;
        }
        match spans.last_mut() {
            Some(span)
                if filled.saturating_add(bytes) <= share
                    && span.units.last().is_some_and(|u| u.query == unit.query) =>
            {
                span.units.push(unit);
                filled += bytes;
            }
            _ => {
                spans.push(Span { units: vec![unit], shard: Shard::WHOLE });
                filled = bytes;
            }
        }
    }
    spans
}

/// Merges what was read of a unit's shard.
pub(super) fn merge(query: &WindowQuery, table: &mut Table, pieces: &Pieces, shard: Shard) -> Result<(), Error> {
    for (_, sections) in pieces {
        let inside = shard.covers(sections.entry.shard);
        sections.decode(query, |partial| {
            let partial = if inside { partial } else { filter(query, partial, shard)? };
            table.read(query, &partial).map_err(|e| query.error(&e))
        })?;
    }
    Ok(())
}

pub(super) fn filter(query: &WindowQuery, partial: Partial, shard: Shard) -> Result<Partial, Error> {
    shard::filter(query, partial, shard).map_err(|e| query.error(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(query: u32, key: i64) -> Unit {
        Unit { query, key }
    }

    #[test]
    fn small_units_are_read_together_and_large_ones_in_shards() {
        let units =
            [(unit(0, 1), 4), (unit(0, 2), 5), (unit(0, 3), 2), (unit(0, 4), 25), (unit(0, 5), 1), (unit(1, 0), 1)];
        let cut: Vec<_> = spans(units, 10)
            .into_iter()
            .map(|s| (s.units.iter().map(|u| u.key).collect::<Vec<_>>(), s.shard))
            .collect();
        let quarter = |prefix| Shard { bits: 2, prefix };
        let mut expected = vec![(vec![1, 2], Shard::WHOLE), (vec![3], Shard::WHOLE)];
        expected.extend((0..4).map(|p| (vec![4], quarter(p))));
        expected.extend([(vec![5], Shard::WHOLE), (vec![0], Shard::WHOLE)]);
        assert_eq!(cut, expected);
    }
}
