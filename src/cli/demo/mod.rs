//! `floe demo`: the whole pipeline with nothing else running, checked against what was produced.
//!
//! Owns: the demo's folder and configuration, what the terminal shows, when it ends. The broker and the devices are
//! [`producer`]'s, the check is [`verify`]'s; between them runs the real pipeline, configured by a file like any other.
//! Exit code 0 means that the check held. librdkafka is used outside [`crate::source`] for its mock cluster only.

mod producer;
mod verify;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use self::producer::{Plan, Producer, SPEED, TOPIC, WINDOW_MS};
use self::verify::{Claimed, DEAD_LETTERS, NAMESPACE, ROWS, Tables, WINDOWS, WindowRow};
use crate::telemetry::{BatchProgress, rfc3339};

const SCHEMA: &str = include_str!("../../../schemas/telemetry.json");
const CONFIG_FILE: &str = "telemetry.toml";

/// How long the pipeline may take to read what is left when the devices stop.
const DRAIN: Duration = Duration::from_secs(60);
/// A last batch without data may follow and close windows.
const SETTLE: Duration = Duration::from_millis(2_500);
/// How often to look whether everything has been read: the last acknowledgement may come after the last batch.
const LOOK: Duration = Duration::from_millis(200);
/// How many rows of a closed minute are shown.
const SHOWN_ROWS: usize = 4;

#[derive(Clone, Debug, clap::Args)]
pub struct DemoOptions {
    /// How long devices send; Ctrl-C ends it earlier
    #[arg(long, default_value_t = 30)]
    pub seconds: u64,
    /// Records a second
    #[arg(long, default_value_t = 3_000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    pub rate: u32,
    /// How many devices send
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub devices: u32,
    /// Where everything is kept; emptied at the start
    #[arg(long, default_value = "data/demo")]
    pub folder: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{0}")]
    Setup(String),
    #[error("the pipeline stopped: {0}")]
    Query(#[from] crate::error::Error),
}

/// What the conductor saw, for the summary.
#[derive(Debug, Default)]
struct Seen {
    batches: u64,
    seconds: f64,
    dead_letters: BTreeMap<String, u64>,
    claimed: Claimed,
    drained: bool,
    /// A second Ctrl-C: nobody wants to wait for a check.
    interrupted: bool,
}

/// Runs the demo to its end.
pub async fn demo(options: &DemoOptions) -> Result<ExitCode, Error> {
    let _lock = empty_folder(&options.folder)?;
    // It ends at about the present, so that no event time lies in the future.
    let span_ms = i64::try_from(options.seconds).unwrap_or(i64::MAX).saturating_mul(1000 * SPEED);
    let start_ms = (jiff::Timestamp::now().as_millisecond() - span_ms).max(0) / WINDOW_MS * WINDOW_MS;
    let plan = Plan { rate: options.rate, devices: options.devices, start_ms, seed: 42 };
    let producer = tokio::task::spawn_blocking(move || Producer::start(plan)).await;
    let producer = Arc::new(producer.map_err(|e| Error::Setup(e.to_string()))?.map_err(Error::Setup)?);

    let port = free_port()?;
    let toml = config_text(&options.folder, &producer.bootstrap_servers, port);
    write(&options.folder.join("telemetry.json"), SCHEMA)?;
    let file = options.folder.join(CONFIG_FILE);
    write(&file, &toml)?;
    // The file alone says what runs: a FLOE_ variable meant for another pipeline must not bend the demo.
    let config = crate::config::load(&file, &BTreeMap::new()).map_err(|e| Error::Setup(e.to_string()))?;

    let tables = Tables::new(&options.folder.join("catalog.db"));
    introduce(options, &file, port);
    let (progress_sender, progress) = mpsc::unbounded_channel();
    let (stop, stopped) = watch::channel(false);
    let conductor = Conductor { producer: producer.clone(), tables: tables.clone(), stop, seen: Seen::default() };
    let interrupts =
        signal(SignalKind::interrupt()).map_err(|e| Error::Setup(format!("cannot listen to Ctrl-C: {e}")))?;
    let conductor = tokio::spawn(conductor.run(progress, interrupts, Duration::from_secs(options.seconds)));
    let committed = producer.clone();
    let result = crate::query::run_observed(config, stopped, move |p: &BatchProgress| {
        for partition in p.sources.iter().flat_map(|s| &s.partitions) {
            committed.committed(partition.partition, partition.end_offset);
        }
        // The receiver is gone only when the conductor has failed.
        let _ = progress_sender.send(p.clone());
    })
    .await;
    result?;
    let seen = conductor.await.map_err(|e| Error::Setup(format!("internal error: {e}")))?;
    if seen.interrupted {
        say("Interrupted: nothing was checked.");
        return Ok(ExitCode::from(130));
    }
    let held = summary(&producer, &tables, &seen).await?;
    paste_lines(&tables)?;
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Follows the pipeline: shows each batch and the windows it closed, and ends it when everything is in the tables.
struct Conductor {
    producer: Arc<Producer>,
    tables: Tables,
    stop: watch::Sender<bool>,
    seen: Seen,
}

impl Conductor {
    async fn run(
        mut self,
        mut progress: mpsc::UnboundedReceiver<BatchProgress>,
        mut interrupts: Signal,
        sending: Duration,
    ) -> Seen {
        let begun = Instant::now();
        let mut deadline = begun + sending;
        let mut sends = true;
        let mut shown_ms = i64::MIN;
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                p = progress.recv() => {
                    let Some(p) = p else { break };
                    self.batch(&p);
                    if p.rows_of(&table_name(WINDOWS)) > 0 {
                        shown_ms = self.newest_windows(shown_ms).await;
                    }
                }
                _ = interrupts.recv() => {
                    if !sends {
                        self.seen.interrupted = true;
                        break;
                    }
                    deadline = Instant::now();
                }
                () = sleep_until(deadline) => {
                    if !sends {
                        break;
                    }
                }
                _ = look.tick() => {}
            }
            if sends && Instant::now() >= deadline {
                sends = false;
                self.producer.stop();
                deadline = Instant::now() + DRAIN;
                say("\n  The devices have stopped; reading what is left.\n");
            }
            self.seen.drained = !sends && self.producer.is_drained();
            if self.seen.drained {
                break;
            }
        }
        if !self.seen.interrupted && self.seen.drained {
            while let Ok(Some(p)) = timeout(SETTLE, progress.recv()).await {
                self.batch(&p);
                if p.counts.offsets == 0 {
                    break;
                }
            }
        }
        // The pipeline may have ended by itself already.
        let _ = self.stop.send(true);
        while let Some(p) = progress.recv().await {
            self.batch(&p);
        }
        self.seen.seconds = begun.elapsed().as_secs_f64();
        self.seen
    }

    fn batch(&mut self, p: &BatchProgress) {
        if self.seen.batches.is_multiple_of(20) {
            say("   batch   records      rows   dead   late     lag   open groups   watermark    seconds");
        }
        self.seen.batches += 1;
        self.seen.claimed.late += p.late();
        let watermark_ms = p.event_time.watermark_ms.unwrap_or(0);
        self.seen.claimed.watermark_ms = self.seen.claimed.watermark_ms.max(watermark_ms);
        for (reason, n) in &p.counts.dead_letters {
            *self.seen.dead_letters.entry(reason.clone()).or_default() += n;
        }
        let groups: u64 = p.state_operators.iter().map(|s| s.num_rows_total).sum();
        let watermark = if watermark_ms > 0 { time_of_day(watermark_ms) } else { "–".to_string() };
        say(&format!(
            "{:>8}{:>10}{:>10}{:>7}{:>7}{:>8}{:>14}{:>12}{:>11.3}",
            p.batch_id,
            thousands(p.counts.records),
            thousands(p.counts.rows),
            p.dead_letters(),
            p.late(),
            thousands(p.lag()),
            thousands(groups),
            watermark,
            p.batch_duration_ms as f64 / 1000.0
        ));
    }

    /// Shows the newest closed minute if it has not been shown, and says which one has been shown last.
    async fn newest_windows(&self, shown_ms: i64) -> i64 {
        let since_ms = (self.seen.claimed.watermark_ms - 2 * WINDOW_MS).max(shown_ms.saturating_add(WINDOW_MS));
        let mut rows = match self.tables.windows_from(Some(since_ms)).await {
            Ok(rows) => rows,
            Err(e) => {
                tracing::warn!(error = %e, "cannot show the newest windows");
                return shown_ms;
            }
        };
        let Some(newest_ms) = rows.iter().map(|r| r.start_ms).max() else { return shown_ms };
        rows.retain(|r| r.start_ms == newest_ms);
        rows.sort_by(|a, b| b.events.cmp(&a.events).then(a.device.cmp(&b.device)));
        show_windows(newest_ms, &rows);
        newest_ms
    }
}

fn show_windows(start_ms: i64, rows: &[WindowRow]) {
    let (from, to) = (time_of_day(start_ms), time_of_day(start_ms + WINDOW_MS));
    say(&format!("\n           window {from} – {to} is closed: {} devices", rows.len()));
    say("           device         events   battery_avg   duration_total");
    for r in rows.iter().take(SHOWN_ROWS) {
        let device = producer::device_name(r.device);
        say(&format!("           {device:<12}{:>9}{:>14.1}{:>17}", r.events, r.battery_avg, r.duration_total));
    }
    if rows.len() > SHOWN_ROWS {
        say(&format!("           … and {} more", rows.len() - SHOWN_ROWS));
    }
    say("");
}

/// Reads the tables back, compares, and says what came out. True when everything is as it must be.
async fn summary(producer: &Producer, tables: &Tables, seen: &Seen) -> Result<bool, Error> {
    let found = tables.read_all().await.map_err(Error::Setup)?;
    let truth = producer.truth();
    let mut verdict = verify::compare(&truth, &found, seen.claimed);
    if !seen.drained {
        let n = truth.produced();
        verdict.differences.insert(0, format!("after {} s not all of {n} records were committed", DRAIN.as_secs()));
    }
    let line = |what: &str, n: u64, note: String| say(&format!("  {what:<14}{:>10}   {note}", thousands(n)));
    say("\nSummary\n");
    let per_second = truth.produced() as f64 / seen.seconds.max(0.001);
    let note = format!("records, {} batches in {:.0} s, {per_second:.0} a second", seen.batches, seen.seconds);
    line("produced", truth.produced(), note);
    line("rows", found.rows.len() as u64, format!("in {}", table_name(ROWS)));
    let reasons: Vec<String> = seen.dead_letters.iter().map(|(reason, n)| format!("{reason} {n}")).collect();
    line(
        "dead letters",
        found.dead_letters.len() as u64,
        format!("in {}: {}", table_name(DEAD_LETTERS), reasons.join(", ")),
    );
    let note = format!("in {}, {} closed minutes", table_name(WINDOWS), verdict.closed_minutes);
    line("window rows", found.windows.len() as u64, note);
    line("counted", u64::try_from(verdict.counted).unwrap_or(0), "rows in closed windows".to_string());
    line("late", seen.claimed.late, "rows behind the watermark: in the rows table, in no window".to_string());
    line(
        "open",
        u64::try_from(verdict.open).unwrap_or(0),
        "rows in windows that the watermark has not passed".to_string(),
    );
    say("");
    if verdict.differences.is_empty() {
        say("  ✓ every offset that was produced is exactly one row or one dead letter");
        say("  ✓ every bad record was refused for the right reason");
        say("  ✓ counted + late + open = rows, and no closed window counts or sums wrongly");
    } else {
        say("  ✗ the tables are not what was produced:");
        for difference in &verdict.differences {
            say(&format!("    - {difference}"));
        }
    }
    Ok(verdict.differences.is_empty())
}

fn paste_lines(tables: &Tables) -> Result<(), Error> {
    let Some((windows, catalog_name)) = tables.metadata_location(WINDOWS).map_err(Error::Setup)? else { return Ok(()) };
    let dead = tables.metadata_location(DEAD_LETTERS).map_err(Error::Setup)?;
    say("\nLook at the tables\n");
    say("  DuckDB:");
    say("    INSTALL iceberg; LOAD iceberg;");
    say(&format!("    SELECT * FROM iceberg_scan('{}') ORDER BY window_start, device_id;", path_of(&windows)));
    if let Some((location, _)) = dead {
        let columns = "reason, count(*) AS records, any_value(message) AS example";
        say(&format!("    SELECT {columns} FROM iceberg_scan('{}') GROUP BY reason;", path_of(&location)));
    }
    say("\n  PyIceberg (pip install 'pyiceberg[sql-sqlite,pyarrow]'):");
    say("    from pyiceberg.catalog.sql import SqlCatalog");
    say(&format!("    catalog = SqlCatalog('{catalog_name}', uri='sqlite:///{}')", tables.catalog_path()));
    say(&format!("    print(catalog.load_table('{}').scan(limit=10).to_arrow().to_pylist())", table_name(WINDOWS)));
    Ok(())
}

fn introduce(options: &DemoOptions, file: &Path, port: u16) {
    let (seconds, devices, rate) = (options.seconds, options.devices, thousands(u64::from(options.rate)));
    say("Floe demo: Kafka → Iceberg, exactly once\n");
    say(&format!(
        "  {devices} devices send {rate} records a second for {seconds} s to an embedded broker (Ctrl-C ends it earlier)."
    ));
    say(&format!(
        "  Their time runs {SPEED} times faster than the clock. About 1% of the records are bad, 0.4% are late.\n"
    ));
    say(&format!("  pipeline   {}", file.display()));
    say(&format!("  tables     {} (emptied at each start)", options.folder.join("warehouse").display()));
    say(&format!("  status     http://127.0.0.1:{port}/\n"));
}

fn config_text(folder: &Path, bootstrap_servers: &str, port: u16) -> String {
    // Paths as TOML strings: JSON's escapes are a subset of TOML's.
    let quoted = |name: &str| serde_json::Value::from(folder.join(name).to_string_lossy().into_owned()).to_string();
    let (catalog, warehouse, checkpoint) = (quoted("catalog.db"), quoted("warehouse"), quoted("checkpoint"));
    format!(
        r#"# The pipeline of `floe demo`, written at each start. Its broker lives only as long as the demo.
name = "demo"

[source]
bootstrap_servers = "{bootstrap_servers}"
topics = ["{TOPIC}"]
starting_offsets = "earliest"

[trigger]
interval = "1 second"

[schema]
file = "telemetry.json"

[transform.columns]
battery_low = "battery_level < 20"

[event_time]
column = "event_timestamp"
watermark_delay = "20 seconds"

[rows]
table = "{NAMESPACE}.{ROWS}"

[[windows]]
table = "{NAMESPACE}.{WINDOWS}"
size = "1 minute"
group_by = ["device_id"]
[windows.aggregates]
events = "count(*)"
battery_avg = "avg(battery_level)"
battery_min = "min(battery_level)"
signal_max = "max(signal_strength)"
duration_total = "sum(duration_ms)"

[dead_letters]
table = "{NAMESPACE}.{DEAD_LETTERS}"

[catalog]
type = "sqlite"
path = {catalog}
warehouse = {warehouse}

[checkpoint]
location = {checkpoint}

[http]
listen = "127.0.0.1:{port}"
"#
    )
}

/// Empties the folder of an earlier demo, and holds it until the result is dropped.
fn empty_folder(folder: &Path) -> Result<std::fs::File, Error> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |error| Error::Io { path, error }
    };
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    let entries: Vec<_> = std::fs::read_dir(folder).and_then(Iterator::collect).map_err(io(folder))?;
    let lock_path = folder.join(".lock");
    if !entries.is_empty() && !lock_path.exists() {
        let message = format!("{}: is not empty and not a demo's; choose another --folder", folder.display());
        return Err(Error::Setup(message));
    }
    let lock = std::fs::File::create(&lock_path).map_err(io(&lock_path))?;
    lock.try_lock().map_err(|e| match e {
        std::fs::TryLockError::WouldBlock => {
            Error::Setup(format!("{}: another demo is running here", folder.display()))
        }
        std::fs::TryLockError::Error(error) => Error::Io { path: lock_path.clone(), error },
    })?;
    for entry in entries {
        let path = entry.path();
        if path == lock_path {
            continue;
        }
        let is_folder = entry.file_type().map_err(io(&path))?.is_dir();
        let removed = if is_folder { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.map_err(io(&path))?;
    }
    Ok(lock)
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(|error| Error::Io { path: path.to_path_buf(), error })
}

/// A port that was free a moment ago: the pipeline's file has to name one.
fn free_port() -> Result<u16, Error> {
    let free = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr());
    free.map(|address| address.port()).map_err(|e| Error::Setup(format!("no free port on 127.0.0.1: {e}")))
}

fn table_name(table: &str) -> String {
    format!("{NAMESPACE}.{table}")
}

fn path_of(location: &str) -> &str {
    location.strip_prefix("file://").unwrap_or(location)
}

/// `14:03:20` of a time in milliseconds, UTC.
fn time_of_day(ms: i64) -> String {
    rfc3339(ms).get(11..19).unwrap_or("–").to_string()
}

fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A line on stdout. A reader that has left (`floe demo | head`) must not stop the check.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_demos_folder_is_emptied() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("demo");
        let lock = empty_folder(&folder).unwrap();
        assert!(empty_folder(&folder).unwrap_err().to_string().contains("another demo is running"));
        std::fs::create_dir(folder.join("warehouse")).unwrap();
        std::fs::write(folder.join("catalog.db"), "x").unwrap();
        drop(lock);
        let _lock = empty_folder(&folder).unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);

        std::fs::write(parent.path().join("thesis.txt"), "x").unwrap();
        assert!(empty_folder(parent.path()).unwrap_err().to_string().contains("not a demo's"));
        assert!(parent.path().join("thesis.txt").exists());
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([thousands(7), thousands(1_000), thousands(1_234_567)], ["7", "1,000", "1,234,567"]);
    }

    #[test]
    fn the_configuration_is_accepted() {
        let parent = tempfile::tempdir().unwrap();
        // Quotes in a path must reach the file escaped.
        let folder = parent.path().join("de\"mo");
        std::fs::create_dir(&folder).unwrap();
        write(&folder.join("telemetry.json"), SCHEMA).unwrap();
        write(&folder.join(CONFIG_FILE), &config_text(&folder, "127.0.0.1:1", 8080)).unwrap();
        let config = crate::config::load(&folder.join(CONFIG_FILE), &BTreeMap::new()).unwrap();
        assert_eq!(config.source.topics, [TOPIC]);
        assert_eq!(config.dead_letters.table, table_name(DEAD_LETTERS));
        let crate::config::CatalogConfig::Sqlite { path, .. } = &config.catalog else { panic!("{config:?}") };
        assert_eq!(path, &folder.join("catalog.db"));
    }
}
