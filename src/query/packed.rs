//! Text that goes into a table property, made small where it is long: a query may have thousands of partitions, and catalogs
//! repeat every property in every version of a table's metadata.
//!
//! Owns: the form. Short text stays as it is, for people to read; long text is zstd, in base64, after `zstd:`.

use std::borrow::Cow;
use std::io::Read;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

const PREFIX: &str = "zstd:";
const SHORT_BYTES: usize = 16 << 10;
/// Of what [`unpack`] makes: a property that claims more is not Floe's.
const MAX_BYTES: u64 = 256 << 20;

/// `text` must not begin like packed text; JSON does not.
pub fn pack(text: String) -> std::io::Result<String> {
    if text.len() <= SHORT_BYTES {
        return Ok(text);
    }
    let packed = zstd::encode_all(text.as_bytes(), 3)?;
    Ok(format!("{PREFIX}{}", STANDARD.encode(packed)))
}

pub fn unpack(text: &str) -> Result<Cow<'_, str>, String> {
    let Some(packed) = text.strip_prefix(PREFIX) else { return Ok(Cow::Borrowed(text)) };
    let packed = STANDARD.decode(packed).map_err(|e| e.to_string())?;
    let decoder = zstd::Decoder::new(packed.as_slice()).map_err(|e| e.to_string())?;
    let mut text = String::new();
    decoder.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|e| e.to_string())?;
    if text.len() as u64 > MAX_BYTES {
        return Err("it is longer than anything that Floe writes".to_string());
    }
    Ok(Cow::Owned(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_packed_and_comes_back() {
        for bytes in [0, 1, SHORT_BYTES, SHORT_BYTES + 1, 1 << 20] {
            let text: String = (0..bytes).map(|i| char::from(b'a' + (i * i % 23) as u8)).collect();
            let packed = pack(text.clone()).unwrap();
            assert_eq!(packed.starts_with(PREFIX), bytes > SHORT_BYTES);
            assert!(packed.len() <= text.len());
            assert_eq!(unpack(&packed).unwrap(), text);
        }
    }

    #[test]
    fn what_is_not_packed_text_is_refused() {
        for text in ["zstd:?", "zstd:AAAA", "zstd:KLUv/SQ="] {
            assert!(unpack(text).is_err(), "{text}");
        }
    }
}
