//! JSON text, read strictly by RFC 8259 and once: whitespace, strings, numbers, literals, and whole values to skip.
//!
//! Owns: the grammar. Does not own: what a value means to a schema. Invariants: the text is valid UTF-8 (checked
//! before); nothing recurses, so depth costs no stack; nothing allocates but the caller's scratch for escapes; every
//! byte is looked at a bounded number of times. Stricter than the grammar in one place: an escaped lone surrogate is
//! refused, because no UTF-8 text can hold it.

use crate::dead_letter::Reason;
use crate::schema::Packed;

use super::fault::{Fault, Scan};

/// Objects and lists inside one another, the document itself included.
pub const MAX_DEPTH: u32 = 128;

/// Small, and never lent to what is not inlined ([`Scanner::apart`]): so the position is in a register, and reading goes on from it
/// without a way through memory.
#[derive(Clone, Copy)]
pub struct Scanner<'a> {
    bytes: &'a [u8],
    pub at: usize,
}

/// A number as it was written.
pub struct Number<'a> {
    document: &'a [u8],
    begin: usize,
    end: usize,
    negative: bool,
    /// All digits before the exponent as one integer; exact when `digits <= 19`.
    mantissa: u64,
    digits: usize,
    /// Digits after the point.
    scale: usize,
    exponent: bool,
}

/// A number that is no int64.
#[derive(Debug, PartialEq, Eq)]
pub enum NotInteger {
    Fraction,
    OutOfRange,
}

impl<'a> Scanner<'a> {
    pub fn new(text: &'a [u8]) -> Self {
        Scanner { bytes: text, at: 0 }
    }

    /// Has `work` go on with a copy, for what is not inlined.
    #[inline(always)]
    pub fn apart<T>(&mut self, work: impl FnOnce(&mut Scanner<'a>) -> T) -> T {
        let mut copy = *self;
        let result = work(&mut copy);
        self.at = copy.at;
        result
    }

    #[inline(always)]
    pub fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    #[inline(always)]
    pub fn text(&self) -> &'a [u8] {
        self.bytes
    }

    #[inline(always)]
    pub fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// Mostly there is none, which one comparison tells.
    #[inline(always)]
    pub fn skip_whitespace(&mut self) {
        while let Some(byte @ ..=b' ') = self.peek() {
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return;
            }
            self.at += 1;
        }
    }

    #[cold]
    pub fn malformed(self, expected: &str) -> Box<Fault> {
        let rest = self.rest();
        let message = match String::from_utf8_lossy(&rest[..rest.len().min(4)]).chars().next() {
            Some(c) => format!("found {c:?} at byte {}; expected {expected}", self.at),
            None => format!("the document ends at byte {}; expected {expected}", self.at),
        };
        Fault::new(Reason::MalformedJson, "$", message)
    }

    /// The colon between a key and its value, and the whitespace around it.
    #[inline(always)]
    pub fn colon(&mut self) -> Scan<()> {
        if self.peek() != Some(b':') {
            self.skip_whitespace();
            if self.peek() != Some(b':') {
                return Err(self.malformed("':' after a key"));
            }
        }
        self.at += 1;
        self.skip_whitespace();
        Ok(())
    }

    /// Nothing but whitespace may follow the document.
    #[inline(always)]
    pub fn end(&mut self) -> Scan<()> {
        self.skip_whitespace();
        if self.at == self.bytes.len() { Ok(()) } else { Err(self.malformed("nothing after the document")) }
    }

    #[inline(always)]
    pub fn literal(&mut self, literal: &'static str) -> Scan<()> {
        if !self.rest().starts_with(literal.as_bytes()) {
            return Err(self.malformed(literal));
        }
        self.at += literal.len();
        Ok(())
    }

    /// The text of a string, `at` being on its opening quote: a part of the document, or `scratch` if it has escapes.
    #[inline(always)]
    pub fn string<'s>(&mut self, scratch: &'s mut Vec<u8>) -> Scan<&'s [u8]>
    where
        'a: 's,
    {
        self.packed_string(scratch).map(|(text, _)| text)
    }

    /// The same with its [`Packed`] form. The lengths of a field's strings differ from record to record: there is no branch on them
    /// while they are short.
    #[inline(always)]
    pub fn packed_string<'s>(&mut self, scratch: &'s mut Vec<u8>) -> Scan<(&'s [u8], Packed)>
    where
        'a: 's,
    {
        let begin = self.at + 1;
        let (first, last) = sixteen(self.bytes, begin);
        let (low, high) = (specials(first), specials(last));
        let found = if low == 0 { 8 + high.trailing_zeros() / 8 } else { low.trailing_zeros() / 8 } as usize;
        let stop = if found < 16 { begin + found } else { find_special(self.bytes, begin + 16) };
        if self.bytes.get(stop) == Some(&b'"') {
            self.at = stop + 1;
            let text = &self.bytes[begin..stop];
            return Ok((text, Packed::of(first, last, text.len())));
        }
        self.apart(|copy| copy.string_with_escapes(begin, scratch))?;
        Ok((scratch, Packed::new(scratch)))
    }

    #[inline(never)]
    fn string_with_escapes(&mut self, begin: usize, scratch: &mut Vec<u8>) -> Scan<()> {
        scratch.clear();
        self.unescape(begin, |part| scratch.extend_from_slice(part))
    }

    fn skip_string(&mut self) -> Scan<()> {
        self.unescape(self.at + 1, |_| {})
    }

    /// Hands out the parts of the string that begins at `begin`, escapes resolved, and stops after its closing quote.
    fn unescape(&mut self, begin: usize, mut part: impl FnMut(&[u8])) -> Scan<()> {
        self.at = begin;
        loop {
            let stop = find_special(self.bytes, self.at);
            part(&self.bytes[self.at..stop]);
            self.at = stop;
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => {
                    let c = self.escape()?;
                    part(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
                Some(_) => return Err(self.malformed("no unescaped control character in a string")),
                None => return Err(self.malformed("the closing quote of a string")),
            }
        }
    }

    fn escape(&mut self) -> Scan<char> {
        self.at += 1;
        let c = match self.peek() {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                self.at += 1;
                let first = self.hex4()?;
                let code = match first {
                    0xD800..=0xDBFF if self.rest().starts_with(b"\\u") => {
                        self.at += 2;
                        let second = self.hex4()?;
                        if !(0xDC00..=0xDFFF).contains(&second) {
                            return Err(self.malformed("the second half of a surrogate pair before this"));
                        }
                        0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00)
                    }
                    _ => first,
                };
                return char::from_u32(code).ok_or_else(|| self.malformed("no lone surrogate before this"));
            }
            _ => return Err(self.malformed("one of \" \\ / b f n r t u after a backslash")),
        };
        self.at += 1;
        Ok(c)
    }

    fn hex4(&mut self) -> Scan<u32> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = self.peek().and_then(|b| char::from(b).to_digit(16));
            code = code * 16 + digit.ok_or_else(|| self.malformed("four hexadecimal digits after \\u"))?;
            self.at += 1;
        }
        Ok(code)
    }

    /// Inlined, so that the number's parts stay in registers: written to memory and read back, they take twice as long.
    #[inline(always)]
    pub fn number(&mut self) -> Scan<Number<'a>> {
        let start = self.at;
        let negative = self.peek() == Some(b'-');
        self.at += usize::from(negative);
        let mut mantissa = 0u64;
        let whole = self.at;
        self.digits(&mut mantissa)?;
        let mut digits = self.at - whole;
        if self.bytes[whole] == b'0' && digits > 1 {
            self.at = whole;
            return Err(self.malformed("no leading zero in a number"));
        }
        let mut scale = 0;
        if self.peek() == Some(b'.') {
            self.at += 1;
            let fraction = self.at;
            self.digits(&mut mantissa)?;
            scale = self.at - fraction;
            digits += scale;
        }
        let exponent = matches!(self.peek(), Some(b'e' | b'E'));
        if exponent {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits(&mut 0)?;
        }
        Ok(Number { document: self.bytes, begin: start, end: self.at, negative, mantissa, digits, scale, exponent })
    }

    /// Eight digits at a time and without a branch on their number, which is different in every record.
    #[inline(always)]
    fn digits(&mut self, mantissa: &mut u64) -> Scan<()> {
        let begin = self.at;
        while let Some(word) = self.rest().first_chunk::<8>() {
            let word = u64::from_le_bytes(*word);
            let count = leading_digits(word);
            *mantissa = mantissa.wrapping_mul(TENS[count]).wrapping_add(leading_number(word, count));
            self.at += count;
            if count < 8 {
                return if self.at == begin { Err(self.malformed("a digit")) } else { Ok(()) };
            }
        }
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            *mantissa = mantissa.wrapping_mul(10).wrapping_add(u64::from(digit - b'0'));
            self.at += 1;
        }
        if self.at == begin { Err(self.malformed("a digit")) } else { Ok(()) }
    }

    /// Steps over any value, checking all of it. `open` objects and lists are around it already.
    #[inline(never)]
    pub fn skip_value(&mut self, open: u32) -> Scan<()> {
        let outer = open;
        let mut open = open;
        // A bit for each container that was opened here, the innermost lowest: 1 for an object.
        let mut objects = 0u128;
        loop {
            self.skip_whitespace();
            match self.peek() {
                Some(b'"') => self.skip_string()?,
                Some(b'-' | b'0'..=b'9') => {
                    self.number()?;
                }
                Some(b't') => self.literal("true")?,
                Some(b'f') => self.literal("false")?,
                Some(b'n') => self.literal("null")?,
                Some(bracket @ (b'{' | b'[')) => {
                    if open == MAX_DEPTH {
                        let message = format!("deeper than {MAX_DEPTH} objects and lists at byte {}", self.at);
                        return Err(Fault::new(Reason::TooDeep, "$", message));
                    }
                    self.at += 1;
                    self.skip_whitespace();
                    let object = bracket == b'{';
                    if self.peek() == Some(if object { b'}' } else { b']' }) {
                        self.at += 1;
                    } else {
                        open += 1;
                        objects = objects << 1 | u128::from(object);
                        if object {
                            self.skip_key()?;
                        }
                        continue;
                    }
                }
                _ => return Err(self.malformed("a value")),
            }
            // A value has ended, and with it perhaps what is around it.
            loop {
                if open == outer {
                    return Ok(());
                }
                let object = objects & 1 == 1;
                self.skip_whitespace();
                match self.peek() {
                    Some(b',') => {
                        self.at += 1;
                        if object {
                            self.skip_whitespace();
                            self.skip_key()?;
                        }
                        break;
                    }
                    Some(b'}') if object => {}
                    Some(b']') if !object => {}
                    _ => return Err(self.malformed(if object { "',' or '}'" } else { "',' or ']'" })),
                }
                self.at += 1;
                open -= 1;
                objects >>= 1;
            }
        }
    }

    fn skip_key(&mut self) -> Scan<()> {
        if self.peek() != Some(b'"') {
            return Err(self.malformed("a key in quotes"));
        }
        self.skip_string()?;
        self.colon()
    }
}

impl Number<'_> {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.document[self.begin..self.end]).unwrap_or_default()
    }

    /// The nearest double; None when its magnitude is beyond the largest one.
    #[inline]
    pub fn to_f64(&self) -> Option<f64> {
        const POWERS: [f64; 23] = [
            1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18,
            1e19, 1e20, 1e21, 1e22,
        ];
        // Both are exact doubles, so that one division rounds once, and correctly.
        if !self.exponent && self.digits <= 19 && self.mantissa <= 1 << 53 && self.scale <= 22 {
            let magnitude = self.mantissa as f64 / POWERS[self.scale];
            return Some(if self.negative { -magnitude } else { magnitude });
        }
        self.text().parse().ok().filter(|f: &f64| f.is_finite())
    }

    /// The exact integer: `1.0` and `1e2` are integers, as JSON Schema has it.
    #[inline]
    pub fn to_i64(&self) -> Result<i64, NotInteger> {
        if self.scale == 0 && !self.exponent && self.digits <= 18 {
            let magnitude = self.mantissa as i64;
            return Ok(if self.negative { -magnitude } else { magnitude });
        }
        self.to_i64_slowly()
    }

    fn to_i64_slowly(&self) -> Result<i64, NotInteger> {
        i64::try_from(self.scaled(0, 19)?).map_err(|_| NotInteger::OutOfRange)
    }

    /// The exact number in units of `10^-scale`; `Fraction` if it has more digits after the point, `OutOfRange` if it
    /// has more than `most` digits (at most 38) in those units.
    pub fn scaled(&self, scale: i64, most: i64) -> Result<i128, NotInteger> {
        let text = self.text();
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let digits = || mantissa.bytes().filter(u8::is_ascii_digit);
        // value = digits without the zeros at both ends × 10^power
        let Some(last) = digits().rev().position(|d| d != b'0') else { return Ok(0) };
        let first = digits().position(|d| d != b'0').unwrap_or(0);
        let significant = digits().count() - first - last;
        // An exponent of 19 digits and more decides by its sign alone.
        let beyond = if exponent.starts_with('-') { i64::MIN / 2 } else { i64::MAX / 2 };
        let exponent: i64 = exponent.parse().map_or(beyond, |e: i64| e.clamp(i64::MIN / 2, i64::MAX / 2));
        let power = exponent - self.scale as i64 + last as i64 + scale;
        if power < 0 {
            return Err(NotInteger::Fraction);
        }
        if significant as i64 + power > most {
            return Err(NotInteger::OutOfRange);
        }
        let magnitude = digits().skip(first).take(significant).fold(0i128, |n, d| n * 10 + i128::from(d - b'0'))
            * 10i128.pow(power as u32);
        Ok(if self.negative { -magnitude } else { magnitude })
    }

    /// The nearest 32-bit float, rounded once; None when its magnitude is beyond the largest one.
    pub fn to_f32(&self) -> Option<f32> {
        self.text().parse().ok().filter(|f: &f32| f.is_finite())
    }

    /// As serde_json holds it: exact as an integer of 64 bits, else the nearest double.
    pub fn to_json(&self) -> Option<serde_json::Number> {
        if self.scale == 0 && !self.exponent {
            let text = self.text();
            if let Ok(n) = text.parse::<i64>() {
                return Some(n.into());
            }
            if let Ok(n) = text.parse::<u64>() {
                return Some(n.into());
            }
        }
        serde_json::Number::from_f64(self.to_f64()?)
    }
}

const TENS: [u64; 9] = [1, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000];

/// How many of eight bytes, the lowest first, are digits before the first that is none.
#[inline]
fn leading_digits(word: u64) -> usize {
    let values = word ^ 0x3030_3030_3030_3030;
    // As in `find_special`: a carry goes only into bytes above one that is marked rightly.
    let others = (values.wrapping_add(0x7676_7676_7676_7676) | values) & 0x8080_8080_8080_8080;
    others.trailing_zeros() as usize / 8
}

/// The number that the first `count` of eight bytes stand for; they are digits.
#[inline]
fn leading_number(word: u64, count: usize) -> u64 {
    let values = word ^ 0x3030_3030_3030_3030;
    // Moved up, with zeros before them; in two halves, because a shift by all 64 bits is none.
    let half = 32 - 4 * count as u32;
    let digits = values << half << half;
    let pairs = digits.wrapping_mul(10).wrapping_add(digits >> 8);
    let (low, high) = (pairs & 0x0000_00FF_0000_00FF, (pairs >> 16) & 0x0000_00FF_0000_00FF);
    low.wrapping_mul(0x000F_4240_0000_0064).wrapping_add(high.wrapping_mul(0x0000_2710_0000_0001)) >> 32
}

/// Sixteen bytes from `at` on, the first lowest; zeros beyond the end.
#[inline(always)]
fn sixteen(bytes: &[u8], at: usize) -> (u64, u64) {
    let word = match (bytes.get(at..).and_then(<[u8]>::first_chunk), bytes.last_chunk()) {
        (Some(chunk), _) => u128::from_le_bytes(*chunk),
        (None, Some(chunk)) => {
            // In two halves, because a shift by all 128 bits is none.
            let half = 4 * (16 - (bytes.len() - at.min(bytes.len()))) as u32;
            u128::from_le_bytes(*chunk) >> half >> half
        }
        (None, None) => bytes.iter().skip(at).rev().fold(0, |word, byte| word << 8 | u128::from(*byte)),
    };
    (word as u64, (word >> 64) as u64)
}

/// The highest bit of the first byte that is a quote, a backslash or a control character, perhaps of bytes above it, of none
/// below.
#[inline(always)]
fn specials(word: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = 0x8080_8080_8080_8080;
    // With one bit turned, quotes and control characters are all that is below 0x21.
    let quote_or_control = (word ^ (ONES * 0x02)).wrapping_sub(ONES * 0x21);
    let backslash = (word ^ (ONES * 0x5C)).wrapping_sub(ONES);
    // A borrow can mark a byte wrongly only above a byte that is marked rightly.
    (quote_or_control | backslash) & !word & HIGHS
}

/// Index of the first quote, backslash or control character from `from` on, or the length. Eight bytes at a time.
#[inline]
fn find_special(bytes: &[u8], from: usize) -> usize {
    let mut at = from;
    while let Some(word) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        let marks = specials(u64::from_le_bytes(*word));
        if marks != 0 {
            return at + marks.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    while let Some(b) = bytes.get(at) {
        if matches!(b, b'"' | b'\\' | 0..=0x1F) {
            break;
        }
        at += 1;
    }
    at.min(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn integer(text: &str) -> Result<i64, NotInteger> {
        Scanner::new(text.as_bytes()).number().unwrap().to_i64()
    }

    fn double(text: &str) -> Option<f64> {
        Scanner::new(text.as_bytes()).number().unwrap().to_f64()
    }

    #[test]
    fn integers_are_exact() {
        for (text, n) in [
            ("0", 0),
            ("-0", 0),
            ("-0.0", 0),
            ("0e999999999999999999999", 0),
            ("1.0", 1),
            ("1e2", 100),
            ("1.50E+1", 15),
            ("100e-2", 1),
            ("0.001e3", 1),
            ("10000000000000000000000e-20", 100),
            ("9007199254740993", 9_007_199_254_740_993),
            ("9007199254740993.000", 9_007_199_254_740_993),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
            ("9.223372036854775807e18", i64::MAX),
            ("-922337203685477580800e-2", i64::MIN),
        ] {
            assert_eq!(integer(text), Ok(n), "{text}");
        }
        for text in ["5.5", "1e-1", "0.1", "-1.000001", "1e-99999999999999999999", "15e-1"] {
            assert_eq!(integer(text), Err(NotInteger::Fraction), "{text}");
        }
        for text in ["9223372036854775808", "-9223372036854775809", "1e19", "1e400", "12e99999999999999999999"] {
            assert_eq!(integer(text), Err(NotInteger::OutOfRange), "{text}");
        }
    }

    /// Of any length and at any distance from the end of the document, where they are read one by one.
    #[test]
    fn digits_are_read_alike_wherever_they_end() {
        let digits = "98765432101234567";
        for length in 1..=digits.len() {
            for after in ["", ",", "}", ":", "/", " \u{7f}\u{80}ü", ",\"next\":12345678"] {
                let text = format!("{}{after}", &digits[..length]);
                let mut scanner = Scanner::new(text.as_bytes());
                assert_eq!(scanner.number().unwrap().to_i64(), Ok(digits[..length].parse().unwrap()), "{text}");
                assert_eq!(scanner.at, length, "{text}");
            }
        }
        for bytes in 0..=u16::MAX {
            let mut text = *b"12345678";
            text[3..5].copy_from_slice(&bytes.to_le_bytes());
            let expected = text.iter().position(|b| !b.is_ascii_digit()).unwrap_or(8);
            assert_eq!(leading_digits(u64::from_le_bytes(text)), expected, "{text:?}");
        }
    }

    #[test]
    fn doubles_are_the_nearest_ones() {
        for text in [
            "0.1",
            "-12.25",
            "9007199254740993",
            "123456789012345678901234567890",
            "1e23",
            "2.2250738585072014e-308",
            "5e-324",
            "1e-400",
            "1.7976931348623157e308",
            "0.30000000000000004",
            "-0",
            "99.99999999999999999999",
        ] {
            assert_eq!(double(text).unwrap().to_bits(), text.parse::<f64>().unwrap().to_bits(), "{text}");
        }
        assert_eq!(double("1e400"), None);
        assert_eq!(double("-1e309"), None);
    }

    #[test]
    fn the_first_special_byte_is_found_wherever_it_stands() {
        for length in 0..40 {
            for position in 0..=length {
                for special in [b'"', b'\\', 0, 0x1F] {
                    for filler in [b'a', 0x20, 0x7F, 0x80, 0xFF, 0x23, 0x5D] {
                        let mut bytes = vec![filler; length];
                        bytes.insert(position, special);
                        assert_eq!(find_special(&bytes, 0), position);
                        assert_eq!(find_special(&bytes[..position], 0), position);
                        for from in 0..=position {
                            let mut expected = [0; 16];
                            let end = bytes.len().min(from + 16);
                            expected[..end - from].copy_from_slice(&bytes[from..end]);
                            let (first, last) = sixteen(&bytes, from);
                            assert_eq!([first.to_le_bytes(), last.to_le_bytes()].concat(), expected);
                            if position - from < 8 {
                                assert_eq!(specials(first).trailing_zeros() as usize / 8, position - from);
                            }
                        }
                    }
                }
            }
        }
    }
}
