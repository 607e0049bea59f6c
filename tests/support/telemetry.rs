//! Device telemetry, generated: message `i` is a pure function of the seed and `i`, so that several threads can fill a
//! topic and the truth about it can be computed without keeping it.
//!
//! Measurements are multiples of a quarter, exact in binary: their sums do not depend on the order of addition.

use std::collections::BTreeMap;
use std::io::Write;

/// 2026-01-01T00:00:00Z
pub const START_MS: i64 = 1_767_225_600_000;
pub const MINUTE_MS: i64 = 60_000;
const STATUSES: [&str; 5] = ["online", "offline", "charging", "idle", "error"];

#[derive(Clone, Debug)]
pub struct Telemetry {
    pub seed: u64,
    pub messages: u64,
    pub devices: u64,
    pub partitions: i32,
    /// Event time of the first message, before disorder.
    pub start_ms: i64,
    /// Event time that the messages span.
    pub span_ms: i64,
    /// A message is up to this much older than its place in the stream says.
    pub disorder_ms: i64,
    /// Of a thousand messages, how many are invalid.
    pub invalid_per_mille: u64,
    /// The kinds that invalid messages have, in equal shares.
    pub invalid: &'static [Invalid],
}

impl Default for Telemetry {
    fn default() -> Self {
        Telemetry {
            seed: 1,
            messages: 10_000,
            devices: 50,
            partitions: 4,
            start_ms: START_MS,
            span_ms: 30 * MINUTE_MS,
            disorder_ms: 30_000,
            invalid_per_mille: 20,
            invalid: Invalid::ALL,
        }
    }
}

/// What can be wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invalid {
    NullValue,
    Empty,
    NotUtf8,
    Truncated,
    TrailingBytes,
    NotAnObject,
    MissingDevice,
    QuotedNumber,
    FractionalInteger,
    BatteryOutOfRange,
    HugeInteger,
    UnknownStatus,
    BadTimestamp,
    DuplicateKey,
}

impl Invalid {
    pub const ALL: &[Invalid] = &[
        Invalid::NullValue,
        Invalid::Empty,
        Invalid::NotUtf8,
        Invalid::Truncated,
        Invalid::TrailingBytes,
        Invalid::NotAnObject,
        Invalid::MissingDevice,
        Invalid::QuotedNumber,
        Invalid::FractionalInteger,
        Invalid::BatteryOutOfRange,
        Invalid::HugeInteger,
        Invalid::UnknownStatus,
        Invalid::BadTimestamp,
        Invalid::DuplicateKey,
    ];

    /// The reason code that its dead letter has.
    pub fn reason(self) -> &'static str {
        match self {
            Invalid::NullValue => "null_value",
            Invalid::Empty => "empty",
            Invalid::NotUtf8 => "invalid_utf8",
            Invalid::Truncated | Invalid::TrailingBytes => "malformed_json",
            Invalid::NotAnObject => "not_an_object",
            Invalid::MissingDevice => "missing_field",
            Invalid::QuotedNumber | Invalid::FractionalInteger => "wrong_type",
            Invalid::BatteryOutOfRange => "out_of_range",
            Invalid::HugeInteger => "number_out_of_range",
            Invalid::UnknownStatus => "not_in_enum",
            Invalid::BadTimestamp => "bad_format",
            Invalid::DuplicateKey => "duplicate_key",
        }
    }
}

/// One message's facts, before they become JSON.
#[derive(Clone, Debug)]
pub struct Reading {
    pub device: u64,
    pub event_ms: i64,
    /// In quarters.
    pub battery: i64,
    /// In quarters, 0 and below.
    pub signal: i64,
    /// In ten-thousandths of a degree.
    pub latitude: i64,
    pub longitude: i64,
    pub duration_ms: i64,
    pub status: usize,
    pub invalid: Option<Invalid>,
}

/// Sebastiano Vigna's SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn below(random: u64, bound: u64) -> i64 {
    ((u128::from(random) * u128::from(bound)) >> 64) as i64
}

impl Telemetry {
    pub fn reading(&self, index: u64) -> Reading {
        let base = mix(self.seed ^ mix(index));
        let random = |lane: u64| mix(base ^ lane.wrapping_mul(0xd6e8_feb8_6659_fd93));
        let progress = (self.span_ms as i128 * i128::from(index) / i128::from(self.messages.max(1))) as i64;
        let invalid = (below(random(1), 1000) < self.invalid_per_mille as i64)
            .then(|| self.invalid[below(random(2), self.invalid.len() as u64) as usize]);
        Reading {
            device: below(random(3), self.devices) as u64,
            event_ms: self.start_ms + progress - below(random(4), self.disorder_ms as u64 + 1),
            battery: below(random(5), 401),
            signal: -below(random(6), 601),
            latitude: below(random(7), 1_800_001) - 900_000,
            longitude: below(random(8), 3_600_001) - 1_800_000,
            duration_ms: below(random(9), 10_000),
            status: below(random(10), STATUSES.len() as u64) as usize,
            invalid,
        }
    }

    /// Messages are keyed by device, so a device has one partition.
    pub fn partition(&self, reading: &Reading) -> i32 {
        below(mix(reading.device), self.partitions as u64) as i32
    }

    /// Valid messages by window, and what becomes of the others.
    pub fn truth(&self) -> Truth {
        let mut truth = Truth::default();
        for index in 0..self.messages {
            truth.add(&self.reading(index));
        }
        truth
    }
}

impl Reading {
    pub fn device_id(&self) -> String {
        device_id(self.device)
    }

    pub fn status_name(&self) -> &'static str {
        STATUSES[self.status]
    }

    /// The message's value; None for a null one. `buffer` is overwritten.
    pub fn value<'a>(&self, buffer: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        buffer.clear();
        match self.invalid {
            None => self.json(buffer),
            Some(Invalid::NullValue) => return None,
            Some(Invalid::Empty) => {}
            Some(invalid) => {
                self.json(buffer);
                spoil(buffer, invalid);
            }
        }
        Some(buffer)
    }

    fn json(&self, out: &mut Vec<u8>) {
        let quarters = |out: &mut Vec<u8>, q: i64| decimal(out, q * 25, 2);
        out.extend_from_slice(b"{\"device_id\":\"dev-");
        padded(out, self.device, 6);
        out.extend_from_slice(b"\",\"event_timestamp\":\"");
        timestamp(out, self.event_ms);
        out.extend_from_slice(b"\",\"battery_level\":");
        quarters(out, self.battery);
        out.extend_from_slice(b",\"signal_strength\":");
        quarters(out, self.signal);
        out.extend_from_slice(b",\"latitude\":");
        decimal(out, self.latitude, 4);
        out.extend_from_slice(b",\"longitude\":");
        decimal(out, self.longitude, 4);
        let _ = write!(out, ",\"duration_ms\":{},\"status\":\"{}\"}}", self.duration_ms, STATUSES[self.status]);
    }
}

pub fn device_id(device: u64) -> String {
    format!("dev-{device:06}")
}

fn spoil(json: &mut Vec<u8>, invalid: Invalid) {
    let text = String::from_utf8(std::mem::take(json)).expect("generated JSON");
    // The text from a field's colon to the comma or brace after it.
    let with = |field: &str, value: &str| {
        let start = text.find(&format!("\"{field}\":")).expect("field") + field.len() + 3;
        let end = start + text[start..].find([',', '}']).expect("end of the field");
        format!("{}{value}{}", &text[..start], &text[end..])
    };
    *json = match invalid {
        Invalid::NullValue | Invalid::Empty => unreachable!("these have no JSON to spoil"),
        Invalid::NotUtf8 => {
            let mut bytes = text.into_bytes();
            bytes[16] = 0xff;
            bytes
        }
        Invalid::Truncated => text[..text.len() - 20].into(),
        Invalid::TrailingBytes => (text + "}").into(),
        Invalid::NotAnObject => format!("[{text}]").into(),
        Invalid::MissingDevice => text.replacen("\"device_id\"", "\"unknown\"", 1).into(),
        Invalid::QuotedNumber => with("battery_level", "\"50\"").into(),
        Invalid::FractionalInteger => with("duration_ms", "5.5").into(),
        Invalid::BatteryOutOfRange => with("battery_level", "100.25").into(),
        Invalid::HugeInteger => with("duration_ms", "99999999999999999999").into(),
        Invalid::UnknownStatus => with("status", "\"unheard-of\"").into(),
        Invalid::BadTimestamp => with("event_timestamp", "\"2026-13-01T00:00:00Z\"").into(),
        Invalid::DuplicateKey => text.replacen('{', "{\"duration_ms\":1,", 1).into(),
    };
}

fn padded(out: &mut Vec<u8>, value: u64, width: usize) {
    let mut digits = [b'0'; 20];
    let mut rest = value;
    let mut at = digits.len();
    while rest > 0 || digits.len() - at < width {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    out.extend_from_slice(&digits[at..]);
}

/// `value / 10^places`, as JSON writes it.
fn decimal(out: &mut Vec<u8>, value: i64, places: usize) {
    if value < 0 {
        out.push(b'-');
    }
    let scale = 10u64.pow(places as u32);
    padded(out, value.unsigned_abs() / scale, 1);
    out.push(b'.');
    padded(out, value.unsigned_abs() % scale, places);
}

/// RFC 3339 with milliseconds, UTC.
pub fn timestamp(out: &mut Vec<u8>, ms: i64) {
    // Howard Hinnant's `civil_from_days`; a formatting library would take longer than all the rest of a message.
    let (days, ms) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000) as u64);
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    padded(out, year as u64, 4);
    for (separator, value, width) in [
        (b'-', month as u64, 2),
        (b'-', (doy - (153 * mp + 2) / 5 + 1) as u64, 2),
        (b'T', ms / 3_600_000, 2),
        (b':', ms / 60_000 % 60, 2),
        (b':', ms / 1000 % 60, 2),
        (b'.', ms % 1000, 3),
    ] {
        out.push(separator);
        padded(out, value, width);
    }
    out.push(b'Z');
}

/// One (device, minute): the row that the window table has to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    pub events: i64,
    pub battery_sum: i64,
    pub battery_min: i64,
    pub battery_max: i64,
    pub duration_sum: i64,
}

#[derive(Clone, Debug, Default)]
pub struct Truth {
    pub valid: u64,
    pub duration_sum: i64,
    pub battery_sum: i64,
    /// Dead letters by reason code.
    pub dead: BTreeMap<String, u64>,
    /// By start of the window in milliseconds, and device.
    pub windows: BTreeMap<(i64, u64), Window>,
    pub max_event_ms: i64,
}

impl Truth {
    pub fn add(&mut self, reading: &Reading) {
        if let Some(invalid) = reading.invalid {
            *self.dead.entry(invalid.reason().to_string()).or_default() += 1;
            return;
        }
        self.valid += 1;
        self.duration_sum += reading.duration_ms;
        self.battery_sum += reading.battery;
        self.max_event_ms = self.max_event_ms.max(reading.event_ms);
        let start = reading.event_ms.div_euclid(MINUTE_MS) * MINUTE_MS;
        let window = self.windows.entry((start, reading.device)).or_insert_with(|| Window {
            battery_min: i64::MAX,
            battery_max: i64::MIN,
            ..Window::default()
        });
        window.events += 1;
        window.battery_sum += reading.battery;
        window.battery_min = window.battery_min.min(reading.battery);
        window.battery_max = window.battery_max.max(reading.battery);
        window.duration_sum += reading.duration_ms;
    }

    pub fn dead_letters(&self) -> u64 {
        self.dead.values().sum()
    }

    /// The windows that a watermark of `delay_ms` behind the newest event has closed.
    pub fn closed(&self, delay_ms: i64) -> BTreeMap<(i64, u64), Window> {
        let watermark = self.max_event_ms - delay_ms;
        let closed = |start: i64| start + MINUTE_MS <= watermark;
        self.windows.iter().filter(|((start, _), _)| closed(*start)).map(|(k, w)| (*k, w.clone())).collect()
    }
}
