//! Base64 as RFC 4648 section 4 has it: padded, no whitespace, unused bits zero.

/// Appends the bytes that `text` stands for; None, with `out` as long as it got, if it is not base64.
pub fn decode(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let groups = text.chunks_exact(4);
    if !groups.remainder().is_empty() {
        return None;
    }
    let last = groups.len().saturating_sub(1);
    for (i, group) in groups.enumerate() {
        let padding = group.iter().rev().take_while(|b| **b == b'=').count();
        if padding > 2 || (padding > 0 && i < last) {
            return None;
        }
        let mut bits = 0;
        for b in &group[..4 - padding] {
            bits = bits << 6 | sextet(*b)?;
        }
        bits <<= 6 * padding;
        let [_, bytes @ ..] = u32::to_be_bytes(bits);
        let (bytes, unused) = bytes.split_at(3 - padding);
        if unused.iter().any(|b| *b != 0) {
            return None;
        }
        out.extend_from_slice(bytes);
    }
    Some(())
}

fn sextet(b: u8) -> Option<u32> {
    Some(u32::from(match b {
        b'A'..=b'Z' => b - b'A',
        b'a'..=b'z' => b - b'a' + 26,
        b'0'..=b'9' => b - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    }))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_vectors_of_rfc_4648() {
        let decode = |text: &str| {
            let mut out = Vec::new();
            super::decode(text.as_bytes(), &mut out).map(|()| out)
        };
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(decode(text).as_deref(), Some(bytes.as_bytes()), "{text}");
        }
        assert_eq!(decode("/+8A"), Some(vec![0xFF, 0xEF, 0]));
        for text in ["Z", "Zg", "Zg=", "Zh==", "Zm9=", "Zg==Zg==", "====", "Z===", "Zm9v\n", "Zm-_", "Zm 9", "=Zg="] {
            assert_eq!(decode(text), None, "{text}");
        }
    }
}
