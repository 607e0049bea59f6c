//! `floe dlq list|show|retry`: what was refused, counted or letter by letter, and another try for it.
//!
//! Owns: arguments and output. Does not own: reading letters ([`crate::dead_letter::letters`]) and retrying them
//! ([`crate::dead_letter::retry`]).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use clap::{Args, Subcommand, ValueEnum};
use futures::TryStreamExt;
use serde_json::{Value, json};

use super::{Error, File, load};
use crate::config::{Config, units};
use crate::dead_letter::Reason;
use crate::dead_letter::letters::{self, Letter, Letters, Selection};
use crate::dead_letter::retry::{self, Report, retry};
use crate::sink::iceberg::PinnedTable;
use crate::telemetry::rfc3339;

#[derive(Debug, Subcommand)]
pub enum Dlq {
    /// Count the dead letters by reason and time.
    List {
        #[command(flatten)]
        file: File,
        #[command(flatten)]
        which: Which,
        /// The time that is counted by.
        #[arg(long, value_enum, default_value_t = By::Day)]
        by: By,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Print dead letters, the newest first.
    Show {
        #[command(flatten)]
        file: File,
        #[command(flatten)]
        which: Which,
        /// How many at most.
        #[arg(long, default_value_t = 20)]
        limit: usize,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Run dead letters through the pipeline as it is now; what passes becomes rows, each once. Windows do not see them.
    Retry {
        #[command(flatten)]
        file: File,
        #[command(flatten)]
        which: Which,
        /// Say what would become of them and write nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Args)]
pub struct Which {
    /// Only letters of this reason; may be given more than once.
    #[arg(long, value_parser = reason)]
    reason: Vec<Reason>,
    /// Only letters of batches since this time: 2026-03-01, 2026-03-01T12:00:00Z or "2 hours" (ago).
    #[arg(long, value_parser = time)]
    since: Option<i64>,
    /// Only letters of batches before this time.
    #[arg(long, value_parser = time)]
    until: Option<i64>,
}

impl Which {
    fn selection(self) -> Selection {
        Selection { reasons: self.reason, since_ms: self.since, until_ms: self.until }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum By {
    Hour,
    Day,
}

fn reason(code: &str) -> Result<Reason, String> {
    let all = || Reason::ALL.map(Reason::code).join(", ");
    Reason::of_code(code).ok_or_else(|| format!("there is no such reason; there are {}", all()))
}

/// Milliseconds since the epoch.
fn time(text: &str) -> Result<i64, String> {
    let midnight = || format!("{}T00:00:00Z", text.trim());
    let ago = || {
        let duration = i64::try_from(units::duration(text)?.as_millis()).ok()?;
        Some((crate::clock::system())() - duration)
    };
    units::timestamp_ms(text)
        .or_else(|| units::timestamp_ms(&midnight()))
        .or_else(ago)
        .ok_or_else(|| "allowed are 2026-03-01, 2026-03-01T12:00:00Z, or how long ago: \"2 hours\"".into())
}

pub async fn dlq(command: Dlq) -> Result<(), Error> {
    match command {
        Dlq::List { file, which, by, json } => {
            let config = load(&file.file)?;
            let groups = group(&config, &which.selection(), by).await?;
            say(&if json { list_json(&groups) } else { list_text(&config.dead_letters.table, &groups, by) });
        }
        Dlq::Show { file, which, limit, json } => {
            let config = load(&file.file)?;
            for (_, text) in show(&config, &which.selection(), limit, json).await? {
                say(&text);
            }
        }
        Dlq::Retry { file, which, dry_run } => {
            let config = load(&file.file)?;
            let report = retry(&config, &which.selection(), dry_run).await.map_err(|e| match e {
                retry::Error::Refused(message) => Error::Other(message),
                retry::Error::Failed(e) => Error::Query(e),
            })?;
            say(&report_text(&config, &report, dry_run));
        }
    }
    Ok(())
}

#[allow(clippy::print_stdout)]
fn say(text: &str) {
    println!("{}", text.trim_end_matches('\n'));
}

async fn open(config: &Config) -> Result<PinnedTable, Error> {
    let name = &config.dead_letters.table;
    let table = PinnedTable::open(&config.catalog, name).await.map_err(crate::error::Error::from)?;
    table.ok_or_else(|| Error::Other(format!("there is no table {name} yet: the pipeline has not run")))
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Group {
    count: u64,
    first_us: i64,
    last_us: i64,
}

/// By start of the hour or day, and reason.
type Groups = BTreeMap<(i64, String), Group>;

async fn group(config: &Config, selection: &Selection, by: By) -> Result<Groups, Error> {
    let failed = |e: crate::sink::Error| Error::Query(e.into());
    let table = open(config).await?;
    let mut groups = Groups::new();
    let mut rows = table.scan(&["reason", "recorded_at"], selection.predicate(), 16 * 1024).await.map_err(failed)?;
    while let Some(batch) = rows.try_next().await.map_err(failed)? {
        for letter in Letters::of(&batch).map_err(failed)?.iter() {
            count(&mut groups, letter.reason, letter.recorded_at_us, by);
        }
    }
    Ok(groups)
}

fn count(groups: &mut Groups, reason: &str, at_us: i64, by: By) {
    let size_us = if by == By::Hour { 3_600_000_000 } else { 86_400_000_000 };
    let group = groups.entry((at_us.div_euclid(size_us) * size_us, reason.to_string())).or_insert(Group {
        count: 0,
        first_us: at_us,
        last_us: at_us,
    });
    group.count += 1;
    group.first_us = group.first_us.min(at_us);
    group.last_us = group.last_us.max(at_us);
}

/// Seconds are enough for people.
fn shown_time(micros: i64) -> String {
    rfc3339(micros.div_euclid(1_000_000) * 1_000)
}

fn list_text(table: &str, groups: &Groups, by: By) -> String {
    if groups.is_empty() {
        return format!("no such dead letters in {table}");
    }
    let time = |start: i64| {
        let text = rfc3339(start.div_euclid(1000));
        text.get(..if by == By::Hour { 16 } else { 10 }).unwrap_or(&text).to_string()
    };
    let head = if by == By::Hour { "hour" } else { "day" };
    let mut rows = vec![[head.to_string(), "reason".into(), "letters".into(), "first".into(), "last".into()]];
    rows.extend(groups.iter().map(|((start, reason), group)| {
        let (first, last) = (shown_time(group.first_us), shown_time(group.last_us));
        [time(*start), reason.clone(), group.count.to_string(), first, last]
    }));
    let width: [usize; 5] = std::array::from_fn(|i| rows.iter().map(|row| row[i].len()).max().unwrap_or(0));
    let mut text = String::new();
    for [time, reason, letters, first, last] in &rows {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{time:0$}  {reason:1$}  {letters:>2$}  {first:3$}  {last}",
            width[0], width[1], width[2], width[3]
        );
    }
    let total: u64 = groups.values().map(|group| group.count).sum();
    let _ = writeln!(text, "{total} in {table}");
    text
}

fn list_json(groups: &Groups) -> String {
    let line = |((start, reason), group): (&(i64, String), &Group)| {
        let from = rfc3339(start.div_euclid(1000));
        let (first, last) = (shown_time(group.first_us), shown_time(group.last_us));
        json!({"from": from, "reason": reason, "letters": group.count, "first": first, "last": last}).to_string()
    };
    groups.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// When, topic, partition, offset: what letters are ordered by.
type Order = (i64, Option<String>, Option<i32>, Option<i64>);

/// The newest letters, the newest first.
async fn show(config: &Config, selection: &Selection, limit: usize, json: bool) -> Result<Vec<(Order, String)>, Error> {
    let failed = |e: crate::sink::Error| Error::Query(e.into());
    let table = open(config).await?;
    let mut rows = letters::scan(&table, selection.predicate()).await.map_err(failed)?;
    let mut newest: Vec<(Order, String)> = Vec::new();
    while let Some(batch) = rows.try_next().await.map_err(failed)? {
        for letter in Letters::of(&batch).map_err(failed)?.iter() {
            let order = (letter.recorded_at_us, letter.topic.map(str::to_string), letter.partition, letter.offset);
            // What is older than all that will be shown is not kept.
            if newest.len() >= limit && newest.get(limit.wrapping_sub(1)).is_none_or(|(last, _)| order <= *last) {
                continue;
            }
            let text = if json { letter_json(&letter).to_string() } else { letter_text(&letter) };
            let at = newest.partition_point(|(other, _)| *other > order);
            newest.insert(at, (order, text));
            newest.truncate(limit);
        }
    }
    Ok(newest)
}

fn letter_text(letter: &Letter<'_>) -> String {
    let mut text = String::new();
    let place = match (letter.topic, letter.partition, letter.offset) {
        (Some(topic), Some(partition), Some(offset)) => format!("{topic}-{partition} offset {offset}"),
        _ => "no record".into(),
    };
    let place = match letter.end_offset {
        Some(end) => format!("{place} to {end}"),
        None => place,
    };
    let mut line = |name: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name:<10} {value}");
    };
    if let Some(path) = letter.path {
        line("path", path);
    }
    line("message", letter.message.unwrap_or_default());
    if let Some(timestamp) = letter.timestamp_us {
        line("timestamp", &rfc3339(timestamp.div_euclid(1000)));
    }
    line("refused", &format!("{} in batch {}", shown_time(letter.recorded_at_us), letter.batch_id));
    if let Some(schema) = letter.schema_fingerprint {
        line("schema", schema);
    }
    if let Some(key) = letter.key {
        line("key", &readable(key));
    }
    for (name, value) in letter.headers.iter().flatten() {
        line("header", &format!("{name} = {}", value.as_deref().map_or("null".into(), readable)));
    }
    line("payload", &letter.payload.map_or("null".into(), readable));
    format!("{place}: {}\n{text}", letter.reason)
}

fn letter_json(letter: &Letter<'_>) -> Value {
    let bytes = |bytes: Option<&[u8]>| match bytes.map(|bytes| (as_text(bytes), bytes)) {
        None => Value::Null,
        Some((Some(text), _)) => text.into(),
        Some((None, bytes)) => json!({"hex": hex(bytes)}),
    };
    let headers: Vec<Value> = letter
        .headers
        .iter()
        .flatten()
        .map(|(name, value)| json!({"name": name, "value": bytes(value.as_deref())}))
        .collect();
    json!({
        "reason": letter.reason,
        "path": letter.path,
        "message": letter.message,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "end_offset": letter.end_offset,
        "timestamp": letter.timestamp_us.map(|us| rfc3339(us.div_euclid(1000))),
        "key": bytes(letter.key),
        "headers": headers,
        "payload": bytes(letter.payload),
        "batch_id": letter.batch_id,
        "recorded_at": rfc3339(letter.recorded_at_us.div_euclid(1000)),
        "schema_fingerprint": letter.schema_fingerprint,
    })
}

/// Text where it is text that a terminal can show, else hexadecimal.
fn readable(bytes: &[u8]) -> String {
    as_text(bytes).map_or_else(|| format!("0x{}", hex(bytes)), str::to_string)
}

fn as_text(bytes: &[u8]) -> Option<&str> {
    let shown = |c: char| !c.is_control() || matches!(c, '\n' | '\r' | '\t');
    std::str::from_utf8(bytes).ok().filter(|text| text.chars().all(shown))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn report_text(config: &Config, report: &Report, dry_run: bool) -> String {
    let tables: Vec<&str> = config.types.iter().filter_map(|of| Some(of.rows.as_ref()?.table.as_str())).collect();
    let rows_table = tables.join(", ");
    let mut text = format!("{} dead letters in {}", report.letters, config.dead_letters.table);
    let mut line = |count: u64, what: String| {
        if count > 0 {
            // Writing to a string cannot fail.
            let _ = write!(text, "\n{count:>8} {what}");
        }
    };
    line(report.already, format!("are in {rows_table} already"));
    line(
        report.rows,
        if dry_run { format!("would become rows of {rows_table}") } else { format!("are rows of {rows_table} now") },
    );
    line(report.filtered, "are valid, and transform.filter or an expectation leaves them out".into());
    line(report.failed.values().sum(), "still fail:".into());
    for (reason, count) in &report.failed {
        line(*count, format!("  {reason}"));
    }
    for late in &report.late {
        let Some(total) = Some(late.closed + late.open).filter(|total| *total > 0) else { continue };
        line(
            total,
            format!(
                "late for {}: windows do not see retried rows ({} of windows that are closed, {} of windows still open)",
                late.table, late.closed, late.open
            ),
        );
    }
    if dry_run {
        text.push_str("\ndry run: nothing was written");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_write_them() {
        assert_eq!(time("2026-03-01"), Ok(1_772_323_200_000));
        assert_eq!(time("2026-03-01T01:00:00+01:00"), Ok(1_772_323_200_000));
        let before = (crate::clock::system())();
        let then = time("2 hours").unwrap() + 7_200_000;
        assert!((before..=(crate::clock::system())()).contains(&then), "{before} {then}");
        assert!(time("yesterday").is_err());
        assert_eq!(reason("wrong_type"), Ok(Reason::WrongType));
        assert!(reason("wrong").unwrap_err().contains("wrong_type"));
    }

    #[test]
    fn counts_by_hour_and_day() {
        let mut groups = Groups::new();
        let hour = 3_600_000_000;
        for (reason, at) in [("empty", 5), ("empty", hour - 1), ("empty", hour), ("wrong_type", 7)] {
            count(&mut groups, reason, at, By::Hour);
        }
        assert_eq!(groups.len(), 3);
        assert_eq!(groups[&(0, "empty".into())], Group { count: 2, first_us: 5, last_us: hour - 1 });
        let text = list_text("a.b", &groups, By::Hour);
        assert!(text.contains("1970-01-01T01:00  empty") && text.ends_with("4 in a.b\n"), "{text}");
        assert_eq!(list_json(&groups).lines().count(), 3);
        assert_eq!(list_text("a.b", &Groups::new(), By::Day), "no such dead letters in a.b");
    }

    #[test]
    fn payloads_are_shown_as_text_or_hex() {
        assert_eq!(readable(b"{\"a\":\n1}"), "{\"a\":\n1}");
        assert_eq!(readable(b"\xff\x00"), "0xff00");
        assert_eq!(readable(b"a\x1b[2J"), "0x611b5b324a");
    }
}
