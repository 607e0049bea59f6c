//! Whether the tables are what was produced: reads them back and compares.
//!
//! It reads like any other reader: the catalog's SQLite file for the newest metadata, then the `iceberg` crate on plain
//! local files. Nothing of Floe's own sink is used, so it does not take the sink's word for anything. It only reads.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Float64Type, Int32Type, Int64Type, TimestampMicrosecondType};
use futures::TryStreamExt;
use iceberg::TableIdent;
use iceberg::expr::Reference;
use iceberg::io::FileIO;
use iceberg::spec::Datum;
use iceberg::table::StaticTable;
use rusqlite::{Connection, OpenFlags};

use super::producer::{Fate, Truth, WINDOW_MS, device_name, device_number};

pub const ROWS: &str = "events";
pub const WINDOWS: &str = "device_minutes";
pub const DEAD_LETTERS: &str = "dead_letters";
pub const NAMESPACE: &str = "telemetry";

/// The tables of the demo, found through the catalog's file.
#[derive(Clone, Debug)]
pub struct Tables {
    catalog: PathBuf,
}

/// One row of the window table.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowRow {
    pub start_ms: i64,
    pub device: u32,
    pub events: i64,
    pub battery_avg: f64,
    pub duration_total: i64,
}

/// What the tables hold, by what was asked of them.
#[derive(Debug, Default)]
pub struct Found {
    /// Partition and offset of every row.
    pub rows: Vec<(i32, i64)>,
    /// The same of every dead letter, and its reason.
    pub dead_letters: Vec<(i32, i64, String)>,
    pub windows: Vec<WindowRow>,
}

/// What the pipeline said about itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Claimed {
    pub watermark_ms: i64,
    pub late: u64,
}

/// The outcome. It held when there are no differences.
#[derive(Debug, Default, PartialEq)]
pub struct Verdict {
    pub differences: Vec<String>,
    pub closed_minutes: u64,
    /// Rows inside closed windows, and inside windows that are still open.
    pub counted: i64,
    pub open: i64,
}

impl Tables {
    pub fn new(catalog: &Path) -> Tables {
        Tables { catalog: catalog.to_path_buf() }
    }

    /// As PyIceberg wants it after `sqlite:///`.
    pub fn catalog_path(&self) -> String {
        std::path::absolute(&self.catalog).unwrap_or_else(|_| self.catalog.clone()).display().to_string()
    }

    /// Where the catalog says a table's metadata is, and the catalog's name. None: there is no such table yet.
    pub fn metadata_location(&self, table: &str) -> Result<Option<(String, String)>, String> {
        let read = || -> rusqlite::Result<Option<(String, String)>> {
            let connection = Connection::open_with_flags(&self.catalog, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
            connection.busy_timeout(std::time::Duration::from_secs(5))?;
            let sql = "SELECT metadata_location, catalog_name FROM iceberg_tables WHERE table_namespace = ?1 AND table_name = ?2";
            let mut statement = connection.prepare(sql)?;
            let mut rows = statement.query((NAMESPACE, table))?;
            rows.next()?.map(|row| Ok((row.get(0)?, row.get(1)?))).transpose()
        };
        read().map_err(|e| format!("catalog {}: {e}", self.catalog.display()))
    }

    pub async fn read_all(&self) -> Result<Found, String> {
        let mut found = Found::default();
        for batch in self.scan(ROWS, &["_kafka_partition", "_kafka_offset"], None).await? {
            let (partitions, offsets) = (int32(&batch, 0, ROWS)?, int64(&batch, 1, ROWS)?);
            found.rows.extend(partitions.into_iter().zip(offsets));
        }
        for batch in self.scan(DEAD_LETTERS, &["partition", "offset", "reason"], None).await? {
            let (partitions, offsets) = (int32(&batch, 0, DEAD_LETTERS)?, int64(&batch, 1, DEAD_LETTERS)?);
            let reasons = text(&batch, 2, DEAD_LETTERS)?;
            found.dead_letters.extend(partitions.into_iter().zip(offsets).zip(reasons).map(|((p, o), r)| (p, o, r)));
        }
        found.windows = self.windows_from(None).await?;
        Ok(found)
    }

    /// Window rows, of windows starting at `since_ms` or later.
    pub async fn windows_from(&self, since_ms: Option<i64>) -> Result<Vec<WindowRow>, String> {
        let columns = ["window_start", "device_id", "events", "battery_avg", "duration_total"];
        let mut rows = Vec::new();
        for batch in self.scan(WINDOWS, &columns, since_ms).await? {
            let starts = batch.column(0).as_primitive_opt::<TimestampMicrosecondType>();
            let starts = starts.ok_or_else(|| wrong_type(&batch, 0, WINDOWS))?;
            let devices = text(&batch, 1, WINDOWS)?;
            let (events, totals) = (int64(&batch, 2, WINDOWS)?, int64(&batch, 4, WINDOWS)?);
            let averages = batch.column(3).as_primitive_opt::<Float64Type>();
            let averages = averages.ok_or_else(|| wrong_type(&batch, 3, WINDOWS))?;
            for (i, device) in devices.iter().enumerate() {
                let start_ms = starts.value(i).div_euclid(1000);
                if since_ms.is_some_and(|since| start_ms < since) {
                    continue;
                }
                rows.push(WindowRow {
                    start_ms,
                    device: device_number(device).ok_or_else(|| format!("{WINDOWS}: found device \"{device}\""))?,
                    events: events[i],
                    battery_avg: averages.value(i),
                    duration_total: totals[i],
                });
            }
        }
        Ok(rows)
    }

    async fn scan(&self, table: &str, columns: &[&str], since_ms: Option<i64>) -> Result<Vec<RecordBatch>, String> {
        let Some((location, _)) = self.metadata_location(table)? else { return Ok(Vec::new()) };
        let read = async {
            let identifier = TableIdent::from_strs([NAMESPACE, table])?;
            let table = StaticTable::from_metadata_file(&location, identifier, FileIO::new_with_fs()).await?;
            let mut scan = table.scan().select(columns.iter().copied());
            if let Some(since) = since_ms {
                let bound = Datum::timestamptz_micros(since.saturating_mul(1000));
                scan = scan.with_filter(Reference::new("window_start").greater_than_or_equal_to(bound));
            }
            scan.build()?.to_arrow().await?.try_collect::<Vec<_>>().await
        };
        read.await.map_err(|e: iceberg::Error| format!("table {NAMESPACE}.{table}: {e}"))
    }
}

/// The check. Every offset is exactly one row or one dead letter, refused for the reason it was made bad for. Every
/// closed window is there once, with no more than was produced for it; what is less adds up to the late rows, exactly.
pub fn compare(truth: &Truth, found: &Found, claimed: Claimed) -> Verdict {
    let mut verdict = Verdict::default();
    for failure in truth.failed.iter().take(3) {
        verdict.differences.push(format!("a record could not be produced, so nothing is certain: {failure}"));
    }
    offsets(truth, found, &mut verdict.differences);
    windows(truth, found, claimed, &mut verdict);
    verdict
}

fn offsets(truth: &Truth, found: &Found, differences: &mut Vec<String>) {
    let mut seen: Vec<Vec<u8>> = truth.fates.iter().map(|p| vec![0; p.len()]).collect();
    let mut tally = Tally::default();
    let rows = found.rows.iter().map(|(p, o)| (*p, *o, None));
    let dead = found.dead_letters.iter().map(|(p, o, reason)| (*p, *o, Some(reason.as_str())));
    for (partition, offset, reason) in rows.chain(dead) {
        let place = (usize::try_from(partition).unwrap_or(usize::MAX), usize::try_from(offset).unwrap_or(usize::MAX));
        let Some(count) = seen.get_mut(place.0).and_then(|p| p.get_mut(place.1)) else {
            tally.add("in a table but never produced", partition, offset);
            continue;
        };
        *count = count.saturating_add(1);
        if *count == 2 {
            tally.add("in the tables more than once", partition, offset);
        }
        match (truth.fates[place.0][place.1], reason) {
            (Some(Fate::Row), None) => {}
            (Some(Fate::Row), Some(_)) => tally.add("valid but a dead letter", partition, offset),
            (Some(Fate::DeadLetter(_)), None) => tally.add("bad but a row", partition, offset),
            (Some(Fate::DeadLetter(expected)), Some(reason)) if expected.code() != reason => {
                let what = format!("refused as {reason} instead of {}", expected.code());
                tally.add(&what, partition, offset);
            }
            (Some(Fate::DeadLetter(_)), Some(_)) => {}
            (None, _) => tally.add("in a table but never acknowledged", partition, offset),
        }
    }
    for (partition, counts) in seen.iter().enumerate() {
        for (offset, _) in counts.iter().enumerate().filter(|(_, n)| **n == 0) {
            tally.add("produced but in no table", partition as i32, offset as i64);
        }
    }
    differences.extend(tally.lines());
}

fn windows(truth: &Truth, found: &Found, claimed: Claimed, verdict: &mut Verdict) {
    let closed = |start_ms: i64| start_ms + WINDOW_MS <= claimed.watermark_ms;
    let mut in_table: HashMap<(u32, i64), &WindowRow> = HashMap::new();
    for row in &found.windows {
        let name = format!("window {} of {}", crate::telemetry::rfc3339(row.start_ms), device_name(row.device));
        let truth = truth.windows.get(&(row.device, row.start_ms)).copied().unwrap_or_default();
        if in_table.insert((row.device, row.start_ms), row).is_some() {
            verdict.differences.push(format!("{name} is in the table more than once"));
        }
        if !closed(row.start_ms) {
            verdict.differences.push(format!("{name} is in the table although the watermark has not passed it"));
        }
        if row.events > truth.events {
            verdict.differences.push(format!("{name} counts {} events; {} were produced", row.events, truth.events));
        }
        if row.events == truth.events && row.duration_total != truth.duration_total {
            let (is, should) = (row.duration_total, truth.duration_total);
            verdict.differences.push(format!("{name} sums duration_ms to {is}; it is {should}"));
        }
        verdict.counted += row.events;
    }
    let mut produced = 0;
    for ((_, start_ms), window) in &truth.windows {
        match closed(*start_ms) {
            true => produced += window.events,
            false => verdict.open += window.events,
        }
    }
    let late = i64::try_from(claimed.late).unwrap_or(i64::MAX);
    if produced != verdict.counted.saturating_add(late) {
        let counted = verdict.counted;
        verdict.differences.push(format!(
            "closed windows: {produced} rows were produced for them; the table counts {counted} and {late} were late"
        ));
    }
    let mut minutes: Vec<i64> = in_table.keys().map(|(_, start)| *start).collect();
    minutes.sort_unstable();
    minutes.dedup();
    verdict.closed_minutes = minutes.len() as u64;
    let more = verdict.differences.len().saturating_sub(12);
    if more > 0 {
        verdict.differences.truncate(12);
        verdict.differences.push(format!("and {more} more differences"));
    }
}

/// Differences by kind, each with how many there are and the first one.
#[derive(Default)]
struct Tally(BTreeMap<String, (u64, i32, i64)>);

impl Tally {
    fn add(&mut self, what: &str, partition: i32, offset: i64) {
        match self.0.get_mut(what) {
            Some((count, ..)) => *count += 1,
            None => drop(self.0.insert(what.to_string(), (1, partition, offset))),
        }
    }

    fn lines(self) -> impl Iterator<Item = String> {
        self.0.into_iter().map(|(what, (count, partition, offset))| {
            let others = if count > 1 { format!(" and {} others", count - 1) } else { String::new() };
            format!("partition {partition} offset {offset}{others}: {what}")
        })
    }
}

fn int32(batch: &RecordBatch, column: usize, table: &str) -> Result<Vec<i32>, String> {
    let array = batch.column(column).as_primitive_opt::<Int32Type>().ok_or_else(|| wrong_type(batch, column, table))?;
    Ok(array.iter().map(|v| v.unwrap_or(-1)).collect())
}

/// Null as -1: no offset, no count and no sum here can be that.
fn int64(batch: &RecordBatch, column: usize, table: &str) -> Result<Vec<i64>, String> {
    let array = batch.column(column).as_primitive_opt::<Int64Type>().ok_or_else(|| wrong_type(batch, column, table))?;
    Ok(array.iter().map(|v| v.unwrap_or(-1)).collect())
}

fn text(batch: &RecordBatch, column: usize, table: &str) -> Result<Vec<String>, String> {
    let array = batch.column(column).as_string_opt::<i32>().ok_or_else(|| wrong_type(batch, column, table))?;
    Ok(array.iter().map(|v| v.unwrap_or_default().to_string()).collect())
}

fn wrong_type(batch: &RecordBatch, column: usize, table: &str) -> String {
    let field = batch.schema_ref().field(column).clone();
    format!("table {NAMESPACE}.{table}: column {} has type {}", field.name(), batch.column(column).data_type())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::demo::producer::WindowTruth;
    use crate::dead_letter::Reason;

    const MINUTE: i64 = 1_700_000_040_000 - 1_700_000_040_000 % WINDOW_MS;

    /// Partition 0: three rows, of which one is late, and a bad record; partition 1: a row of a window still open.
    fn case() -> (Truth, Found, Claimed) {
        let bad = Fate::DeadLetter(Reason::WrongType);
        let truth = Truth {
            fates: vec![vec![Some(Fate::Row), Some(bad), Some(Fate::Row), Some(Fate::Row)], vec![Some(Fate::Row)]],
            windows: [
                ((1, MINUTE), WindowTruth { events: 2, duration_total: 30 }),
                ((2, MINUTE - WINDOW_MS), WindowTruth { events: 1, duration_total: 5 }),
                ((1, MINUTE + WINDOW_MS), WindowTruth { events: 1, duration_total: 7 }),
            ]
            .into(),
            sent_late: 1,
            failed: Vec::new(),
        };
        let window = WindowRow { start_ms: MINUTE, device: 1, events: 2, battery_avg: 50.0, duration_total: 30 };
        let found = Found {
            rows: vec![(0, 0), (0, 2), (0, 3), (1, 0)],
            dead_letters: vec![(0, 1, "wrong_type".to_string())],
            windows: vec![window],
        };
        (truth, found, Claimed { watermark_ms: MINUTE + WINDOW_MS, late: 1 })
    }

    fn difference(change: impl FnOnce(&mut Truth, &mut Found, &mut Claimed)) -> String {
        let (mut truth, mut found, mut claimed) = case();
        change(&mut truth, &mut found, &mut claimed);
        compare(&truth, &found, claimed).differences.join("\n")
    }

    #[test]
    fn what_is_right_holds() {
        let (truth, found, claimed) = case();
        let verdict = compare(&truth, &found, claimed);
        assert_eq!(verdict, Verdict { differences: vec![], closed_minutes: 1, counted: 2, open: 1 });
    }

    #[test]
    fn every_kind_of_difference_is_named() {
        let d = difference(|_, f, _| f.rows.retain(|r| *r != (0, 2)));
        assert_eq!(d, "partition 0 offset 2: produced but in no table");
        let d = difference(|_, f, _| f.rows.extend([(0, 2), (0, 3)]));
        assert_eq!(d, "partition 0 offset 2 and 1 others: in the tables more than once");
        assert!(difference(|_, f, _| f.rows.push((7, 1))).contains("never produced"));
        assert!(difference(|_, f, _| f.rows.push((0, -1))).contains("never produced"));
        assert!(difference(|_, f, _| f.dead_letters[0].2 = "empty".into()).contains("empty instead of wrong_type"));
        let d = difference(|_, f, _| (f.rows.push((0, 1)), f.dead_letters.clear()).1);
        assert!(d.contains("bad but a row"), "{d}");
        assert!(difference(|_, f, _| f.windows[0].events = 3).contains("counts 3 events; 2 were produced"));
        assert!(difference(|_, f, _| f.windows[0].duration_total = 31).contains("sums duration_ms to 31"));
        assert!(difference(|_, f, _| f.windows.push(f.windows[0].clone())).contains("more than once"));
        assert!(difference(|_, _, c| c.late = 0).contains("3 rows were produced for them"));
        assert!(difference(|_, _, c| c.watermark_ms -= 1).contains("watermark has not passed"));
        assert!(difference(|t, _, _| t.failed.push("broker gone".into())).contains("broker gone"));
    }

    /// The reader here and the sink know nothing of each other; this is where they meet.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_the_sink_writes_is_read_back() {
        use crate::sink::iceberg::{BatchCommit, IcebergSink, Marker, TableSpec};
        use arrow::array::{ArrayRef, Float64Array, Int32Array, Int64Array, StringArray, TimestampMicrosecondArray};
        use std::sync::Arc;

        let folder = tempfile::tempdir().unwrap();
        let tables = Tables::new(&folder.path().join("catalog.db"));
        let column = |array: ArrayRef| array;
        let ints = |v: &[i32]| column(Arc::new(Int32Array::from(v.to_vec())));
        let longs = |v: &[i64]| column(Arc::new(Int64Array::from(v.to_vec())));
        let words = |v: &[&str]| column(Arc::new(StringArray::from(v.to_vec())));
        let starts =
            TimestampMicrosecondArray::from(vec![(MINUTE - WINDOW_MS) * 1000, MINUTE * 1000]).with_timezone("UTC");
        let rows = vec![("_kafka_partition", ints(&[0, 1])), ("_kafka_offset", longs(&[5, 6]))];
        let windows = vec![
            ("window_start", column(Arc::new(starts))),
            ("device_id", words(&["device-0001", "device-0002"])),
            ("events", longs(&[3, 4])),
            ("battery_avg", column(Arc::new(Float64Array::from(vec![50.5, 1.0])))),
            ("duration_total", longs(&[30, 40])),
        ];
        let dead = vec![("partition", ints(&[2])), ("offset", longs(&[7])), ("reason", words(&["empty"]))];
        let batches = [(ROWS, rows), (WINDOWS, windows), (DEAD_LETTERS, dead)]
            .map(|(table, columns)| (table_spec_name(table), RecordBatch::try_from_iter(columns).unwrap()));

        let catalog = crate::config::CatalogConfig::Sqlite {
            path: folder.path().join("catalog.db"),
            warehouse: folder.path().join("warehouse").to_str().unwrap().to_string(),
        };
        let specs: Vec<TableSpec> = batches
            .iter()
            .map(|(name, batch)| TableSpec {
                name: name.clone(),
                schema: batch.schema(),
                partition_by: vec![],
                sort_by: vec![],
                properties: BTreeMap::new(),
            })
            .collect();
        let sink = IcebergSink::open(&catalog, uuid::Uuid::new_v4(), "demo", &specs).await.unwrap();
        assert!(tables.read_all().await.unwrap().rows.is_empty(), "tables without a snapshot");
        let writer_sink = sink.clone();
        let files = tokio::task::spawn_blocking(move || {
            batches
                .iter()
                .enumerate()
                .map(|(i, (_, batch))| {
                    let mut writer = writer_sink.writer(i, 0, uuid::Uuid::new_v4(), 0);
                    writer.write(batch).unwrap();
                    writer.finish().unwrap()
                })
                .collect()
        })
        .await
        .unwrap();
        let marker = Marker { pipeline: "demo".into(), batch: 0, plan: "sha256:0".into() };
        let uuids = sink.load().await.unwrap().into_iter().map(|t| (t.name, t.uuid)).collect();
        sink.commit(&BatchCommit {
            marker,
            tables: uuids,
            properties: BTreeMap::new(),
            summary: BTreeMap::new(),
            files,
        })
        .await
        .unwrap();

        let found = tables.read_all().await.unwrap();
        assert_eq!(found.rows, [(0, 5), (1, 6)]);
        assert_eq!(found.dead_letters, [(2, 7, "empty".to_string())]);
        assert_eq!(found.windows.len(), 2);
        let newest = tables.windows_from(Some(MINUTE)).await.unwrap();
        let expected = WindowRow { start_ms: MINUTE, device: 2, events: 4, battery_avg: 1.0, duration_total: 40 };
        assert_eq!(newest, [expected]);
        assert!(tables.metadata_location(ROWS).unwrap().is_some());
        assert_eq!(tables.metadata_location("nothing").unwrap(), None);
    }

    fn table_spec_name(table: &str) -> String {
        format!("{NAMESPACE}.{table}")
    }
}
