//! The groups of one window in memory: in one table or, once they are many, in a table for each shard of their keys.
//!
//! A batch is merged into the tables of a large window side by side: its groups are all over memory, so that almost every one
//! of them is waited for. Invariant: there are 2^n tables, and a group is in the one that its key's hash begins with.

use datafusion_common::Result;

use super::groups::{GroupTable, Partial};
use super::query::WindowQuery;
use super::shard::{self, Shard};

/// A window with more groups is kept in shards. A table of so many is some 15 MB, about what a cache holds, and a batch that
/// touches every group of it is merged in some 10 ms. Tests have few groups and shards nevertheless.
pub(super) const MANY_GROUPS: usize = if cfg!(test) { 40 } else { 128 * 1024 };
/// Sixteen shards: enough for as many workers, and what a batch has for one of them is still worth a section of its own.
pub(super) const SHARD_BITS: u8 = 4;

pub(super) struct ShardedTable(Vec<GroupTable>);

impl From<GroupTable> for ShardedTable {
    fn from(table: GroupTable) -> ShardedTable {
        ShardedTable(vec![table])
    }
}

impl ShardedTable {
    pub fn new(query: &WindowQuery) -> Result<ShardedTable> {
        Self::of_bits(query, 0)
    }

    /// By shard, all of them.
    pub fn of(tables: Vec<GroupTable>) -> ShardedTable {
        debug_assert!(tables.len().is_power_of_two());
        ShardedTable(tables)
    }

    /// Empty, with a table for each shard of so many bits.
    pub fn of_bits(query: &WindowQuery, bits: u8) -> Result<ShardedTable> {
        (0..1usize << bits).map(|_| GroupTable::new(query)).collect::<Result<_>>().map(ShardedTable)
    }

    /// The table in shards, if it has become large.
    pub fn split_if_large(query: &WindowQuery, table: GroupTable) -> Result<ShardedTable> {
        if table.groups() <= MANY_GROUPS {
            return Ok(table.into());
        }
        let mut sharded = Self::of_bits(query, SHARD_BITS)?;
        sharded.merge(query, &table.into_partial(query)?)?;
        Ok(sharded)
    }

    /// The groups of a shard, which have been put together by themselves.
    pub fn put(&mut self, shard: Shard, table: ShardedTable) {
        let number = shard.number(self.bits());
        for (place, table) in self.0.iter_mut().skip(number).zip(table.0) {
            *place = table;
        }
    }

    /// How many bits of a key's hash tell which table it is in.
    pub fn bits(&self) -> u8 {
        self.0.len().trailing_zeros() as u8
    }

    pub fn groups(&self) -> usize {
        self.0.iter().map(GroupTable::groups).sum()
    }

    pub fn bytes(&self) -> usize {
        self.0.iter().map(GroupTable::bytes).sum()
    }

    pub fn merge(&mut self, query: &WindowQuery, partial: &Partial) -> Result<()> {
        if let [table] = self.0.as_mut_slice() {
            return table.merge(query, partial);
        }
        let bits = self.bits();
        for (shard, partial) in shard::cut(query, partial.clone(), Shard::WHOLE, bits)? {
            if let Some(table) = self.0.get_mut(shard.number(bits)) {
                table.merge(query, &partial)?;
            }
        }
        Ok(())
    }

    pub fn into_tables(self) -> Vec<GroupTable> {
        self.0
    }
}
