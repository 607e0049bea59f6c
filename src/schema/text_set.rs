//! The strings of an `enum`, looked up once a record.

/// Sorted, and where all are short also packed: the strings of a stream are told apart without a branch on which of them
/// it is, since that is what no processor can predict.
#[derive(Debug)]
pub struct TextSet {
    sorted: Vec<String>,
    packed: Option<Vec<Packed>>,
}

/// A string of at most 16 bytes: its length and all of its bytes, in two words that may overlap.
#[derive(Clone, Copy, Debug)]
struct Packed {
    length: u64,
    first: u64,
    last: u64,
}

/// Beyond so many strings a binary search is faster.
const FEW: usize = 16;

impl TextSet {
    pub fn new(mut texts: Vec<String>) -> TextSet {
        texts.sort_unstable();
        texts.dedup();
        let packed = if texts.len() <= FEW { texts.iter().map(|t| Packed::new(t.as_bytes())).collect() } else { None };
        TextSet { sorted: texts, packed }
    }

    pub fn sorted(&self) -> &[String] {
        &self.sorted
    }

    #[inline]
    pub fn contains(&self, text: &[u8]) -> bool {
        match (&self.packed, Packed::new(text)) {
            (Some(packed), Some(text)) => packed.iter().fold(false, |found, other| found | other.equals(text)),
            (Some(_), None) => false,
            (None, _) => self.sorted.binary_search_by(|other| other.as_bytes().cmp(text)).is_ok(),
        }
    }
}

impl Packed {
    #[inline]
    fn new(text: &[u8]) -> Option<Packed> {
        let (first, last) = match (text.first_chunk::<8>(), text.last_chunk::<8>()) {
            (Some(first), Some(last)) if text.len() <= 16 => (u64::from_le_bytes(*first), u64::from_le_bytes(*last)),
            (Some(_), _) => return None,
            _ => match (text.first_chunk::<4>(), text.last_chunk::<4>()) {
                (Some(first), Some(last)) => (u32::from_le_bytes(*first).into(), u32::from_le_bytes(*last).into()),
                _ => (text.iter().fold(0, |word, b| word << 8 | u64::from(*b)), 0),
            },
        };
        Some(Packed { length: text.len() as u64, first, last })
    }

    #[inline]
    fn equals(self, other: Packed) -> bool {
        (self.length ^ other.length) | (self.first ^ other.first) | (self.last ^ other.last) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_all_lengths_are_told_apart() {
        let letters = "abcdefghijklmnopqrstuvwxyz";
        let prefixes = |lengths: std::ops::Range<usize>| lengths.map(|n| letters[..n].to_owned()).collect::<Vec<_>>();
        for lengths in [0..4, 3..9, 7..17, 0..16, 10..20, 0..26, 16..17, 17..18] {
            let set = TextSet::new(prefixes(lengths.clone()));
            for n in 0..letters.len() {
                assert_eq!(set.contains(&letters.as_bytes()[..n]), lengths.contains(&n), "{n} of {lengths:?}");
                for changed in 0..n {
                    let mut other = letters.as_bytes()[..n].to_vec();
                    other[changed] = 0;
                    assert!(!set.contains(&other), "{n} of {lengths:?}, byte {changed}");
                }
            }
        }
    }
}
