//! Shares of a unit's groups, by a hash of their keys: what makes a unit of any size go through little memory.
//!
//! Invariant: a group's shard follows from its key alone and is the same in every file ever written. Shards nest: each bit
//! more halves them, so sections of different fineness can lie side by side and a reader takes those that overlap.

use arrow::array::ArrayRef;
use datafusion_common::Result;

use super::groups::Partial;
use super::query::WindowQuery;

/// The finest shards: 4,096 of a unit.
const MAX_BITS: u8 = 12;

/// The groups whose key's hash begins with `prefix`, which is `bits` long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shard {
    pub bits: u8,
    pub prefix: u16,
}

impl Shard {
    pub const WHOLE: Shard = Shard { bits: 0, prefix: 0 };

    /// All shards of a unit, so many that each has at most `share` of `total`.
    pub fn split(total: u64, share: u64) -> impl Iterator<Item = Shard> {
        let bits = extra_bits(Shard::WHOLE, total, share);
        (0..1u16 << bits).map(move |prefix| Shard { bits, prefix })
    }

    pub fn covers(self, other: Shard) -> bool {
        self.bits <= other.bits && other.prefix >> (other.bits - self.bits) == self.prefix
    }

    pub fn overlaps(self, other: Shard) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// Which of 2^`bits` shards it is in or, where it is coarser than these, begins with.
    pub fn number(self, bits: u8) -> usize {
        match self.bits >= bits {
            true => (self.prefix >> (self.bits - bits)) as usize,
            false => (self.prefix as usize) << (bits - self.bits),
        }
    }

    fn holds(self, hash: u16) -> bool {
        self.covers(Shard { bits: 16, prefix: hash })
    }
}

/// How much finer shards have to be for each to have about `share` of the `total` of this one.
pub(super) fn extra_bits(shard: Shard, total: u64, share: u64) -> u8 {
    let pieces = total.div_ceil(share.max(1)).clamp(1, 1 << MAX_BITS).next_power_of_two();
    (pieces.trailing_zeros() as u8).min(MAX_BITS.saturating_sub(shard.bits))
}

/// Never to be changed: files tell what is in them by it. Sixteen bits, of which the first ones count.
pub(super) fn hashes(query: &WindowQuery, keys: &[ArrayRef]) -> Result<Vec<u16>> {
    // Behind the keys of a session are its bounds.
    let keys = keys.get(..query.key_schema().fields().len()).unwrap_or_default();
    let rows = query.key_rows().convert_columns(keys)?;
    let hash = |row: &[u8]| (crc32fast::hash(row).wrapping_mul(0x9E37_79B1) >> 16) as u16;
    Ok(rows.iter().map(|row| hash(row.as_ref())).collect())
}

/// Sessions are kept by shares of their keys, each a unit. It takes the last bits of the hash: shards of a share take the first.
const SHARES: u16 = 64;

pub(super) fn by_share(query: &WindowQuery, partial: Partial) -> Result<Vec<(i64, Partial)>> {
    let mut indices: Vec<Vec<u32>> = vec![Vec::new(); SHARES as usize];
    for (group, hash) in hashes(query, &partial.keys)?.into_iter().enumerate() {
        if let Some(share) = indices.get_mut((hash % SHARES) as usize) {
            share.push(group as u32);
        }
    }
    let shares = indices.into_iter().zip(0..).filter(|(groups, _)| !groups.is_empty());
    shares.map(|(groups, share)| Ok((share, partial.gather(groups)?))).collect()
}

/// The groups that are in the shard, in their order.
pub(super) fn filter(query: &WindowQuery, partial: Partial, shard: Shard) -> Result<Partial> {
    if shard == Shard::WHOLE {
        return Ok(partial);
    }
    // Without keys there is one group, and it is in one shard only.
    if partial.keys.is_empty() {
        return if shard.prefix == 0 { Ok(partial) } else { partial.gather(Vec::new()) };
    }
    let hashes = hashes(query, &partial.keys)?;
    let indices = hashes.iter().enumerate().filter(|(_, hash)| shard.holds(**hash)).map(|(i, _)| i as u32);
    partial.gather(indices.collect())
}

/// Splits a partial of the shard into finer ones of about `groups` each; one that is small enough stays as it is.
pub(super) fn split(query: &WindowQuery, partial: Partial, shard: Shard, groups: u64) -> Result<Vec<(Shard, Partial)>> {
    let extra = extra_bits(shard, partial.groups as u64, groups);
    cut(query, partial, shard, extra)
}

/// Into shards that are so many bits finer; without keys there is one group, which stays where it is.
pub(super) fn cut(query: &WindowQuery, partial: Partial, shard: Shard, extra: u8) -> Result<Vec<(Shard, Partial)>> {
    if extra == 0 || partial.keys.is_empty() {
        return Ok(vec![(shard, partial)]);
    }
    let bits = shard.bits + extra;
    let first = shard.prefix << extra;
    let mut indices: Vec<Vec<u32>> = vec![Vec::new(); 1 << extra];
    for (group, hash) in hashes(query, &partial.keys)?.into_iter().enumerate() {
        if let Some(piece) = indices.get_mut(((hash >> (16 - bits)) - first) as usize) {
            piece.push(group as u32);
        }
    }
    let pieces = indices.into_iter().zip(first..).filter(|(groups, _)| !groups.is_empty());
    pieces.map(|(groups, prefix)| Ok((Shard { bits, prefix }, partial.gather(groups)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_nest() {
        let quarter = |prefix| Shard { bits: 2, prefix };
        let eighth = |prefix| Shard { bits: 3, prefix };
        assert!(Shard::WHOLE.covers(quarter(3)) && !quarter(3).covers(Shard::WHOLE));
        assert!(quarter(2).covers(eighth(4)) && quarter(2).covers(eighth(5)) && !quarter(2).covers(eighth(6)));
        assert!(eighth(5).overlaps(quarter(2)) && !eighth(5).overlaps(quarter(1)) && quarter(1).covers(quarter(1)));
        assert_eq!(
            [eighth(5).number(2), quarter(2).number(2), quarter(2).number(3), Shard::WHOLE.number(4)],
            [2, 2, 4, 0]
        );
        assert!(quarter(2).holds(0x8000) && quarter(2).holds(0xBFFF) && !quarter(2).holds(0xC000));
    }

    #[test]
    fn as_many_shards_as_keep_each_small() {
        for (total, share, shards) in [(0, 10, 1), (10, 10, 1), (11, 10, 2), (41, 10, 8), (u64::MAX, 1, 4096)] {
            assert_eq!(Shard::split(total, share).count(), shards, "{total} by {share}");
        }
        assert_eq!(Shard::split(3, 1).map(|s| s.prefix).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(extra_bits(Shard { bits: 11, prefix: 0 }, 100, 1), 1);
    }
}
