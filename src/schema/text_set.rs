//! The strings of an `enum`, looked up once a record.

/// Sorted, and where all are short also packed: the strings of a stream are told apart without a branch on which of them
/// it is, since that is what no processor can predict.
#[derive(Debug)]
pub struct TextSet {
    sorted: Vec<String>,
    packed: Option<Vec<Packed>>,
}

/// A string of less than 16 bytes as two words: its bytes, then zeros, in the last byte its length. What is longer equals no such
/// string.
#[derive(Clone, Copy, Debug)]
pub struct Packed {
    first: u64,
    last: u64,
}

/// Beyond so many strings a binary search is faster.
const FEW: usize = 16;

impl TextSet {
    pub fn new(mut texts: Vec<String>) -> TextSet {
        texts.sort_unstable();
        texts.dedup();
        let short = texts.len() <= FEW && texts.iter().all(|text| text.len() <= Packed::MOST);
        let packed = short.then(|| texts.iter().map(|text| Packed::new(text.as_bytes())).collect());
        TextSet { sorted: texts, packed }
    }

    pub fn sorted(&self) -> &[String] {
        &self.sorted
    }

    /// `packed` is the same as `text`.
    #[inline]
    pub fn contains(&self, text: &[u8], packed: Packed) -> bool {
        match &self.packed {
            Some(short) => short.iter().fold(false, |found, other| found | other.equals(packed)),
            None => self.sorted.binary_search_by(|other| other.as_bytes().cmp(text)).is_ok(),
        }
    }
}

impl Packed {
    pub const MOST: usize = 15;
    const LONG: Packed = Packed { first: 0, last: u64::MAX };
    /// By length: the bytes of a string.
    const MASKS: [(u64, u64); 16] = {
        let mut masks = [(0, 0); 16];
        let mut length = 1;
        while length < 16 {
            let all = (1u128 << (8 * length)) - 1;
            masks[length] = (all as u64, (all >> 64) as u64);
            length += 1;
        }
        masks
    };

    pub fn new(text: &[u8]) -> Packed {
        let mut head = [0; 16];
        let short = text.len().min(16);
        head[..short].copy_from_slice(&text[..short]);
        let head = u128::from_le_bytes(head);
        Packed::of(head as u64, (head >> 64) as u64, text.len())
    }

    /// Of a string of that length with these first 16 bytes, what comes after it included.
    #[inline(always)]
    pub fn of(first: u64, last: u64, length: usize) -> Packed {
        match Packed::MASKS.get(length) {
            Some(mask) => Packed { first: first & mask.0, last: last & mask.1 | (length as u64) << 56 },
            None => Packed::LONG,
        }
    }

    /// The string and what comes after it.
    #[inline(always)]
    pub fn bytes(self) -> [u8; 16] {
        (u128::from(self.last) << 64 | u128::from(self.first)).to_le_bytes()
    }

    #[inline(always)]
    fn equals(self, other: Packed) -> bool {
        (self.first ^ other.first) | (self.last ^ other.last) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_all_lengths_are_told_apart() {
        let letters = "abcdefghijklmnopqrstuvwxyz";
        let prefixes = |lengths: std::ops::Range<usize>| lengths.map(|n| letters[..n].to_owned()).collect::<Vec<_>>();
        for lengths in [0..4, 3..9, 7..16, 7..17, 0..16, 10..20, 0..26, 15..16, 16..17, 17..18] {
            let set = TextSet::new(prefixes(lengths.clone()));
            for n in 0..letters.len() {
                let text = &letters.as_bytes()[..n];
                assert_eq!(set.contains(text, Packed::new(text)), lengths.contains(&n), "{n} of {lengths:?}");
                for changed in 0..n {
                    let mut other = letters.as_bytes()[..n].to_vec();
                    other[changed] = 0;
                    assert!(!set.contains(&other, Packed::new(&other)), "{n} of {lengths:?}, byte {changed}");
                }
            }
        }
    }
}
