//! From settings to a [`Config`]: what every value means and which combinations make sense.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use arrow::datatypes::DataType;

use super::read::Reader;
use super::*;
use crate::execute::PROVENANCE;
use crate::late;
use crate::retry::{Deadlines, Strategy};
use crate::state::REVISION;
use crate::window::Windowing;

/// Properties of librdkafka that decide whether records are read exactly once, or that a setting of Floe stands for.
pub const OWNED_PROPERTIES: &[(&str, &str)] = &[
    ("bootstrap.servers", "set source.bootstrap_servers"),
    ("metadata.broker.list", "set source.bootstrap_servers"),
    ("enable.auto.commit", "offsets are kept in the checkpoint"),
    ("auto.commit.enable", "offsets are kept in the checkpoint"),
    ("auto.commit.interval.ms", "offsets are kept in the checkpoint"),
    ("enable.auto.offset.store", "offsets are kept in the checkpoint"),
    ("auto.offset.reset", "set source.starting_offsets and source.fail_on_data_loss"),
    ("enable.partition.eof", "the end of a range is found by it"),
    ("group.instance.id", "partitions are assigned by Floe, not by a group"),
    ("group.protocol", "partitions are assigned by Floe, not by a group"),
    ("partition.assignment.strategy", "partitions are assigned by Floe, not by a group"),
    ("allow.auto.create.topics", "a topic that is missing is a mistake"),
    ("queued.max.messages.kbytes", "set execution.buffer"),
    ("enabled_events", "events are Floe's"),
    ("transactional.id", "set dead_letters.topic; the id is made from the query's"),
    ("transaction.timeout.ms", "set deadlines.commit"),
    ("enable.idempotence", "dead_letters.topic is written in transactions"),
];

/// None when there is no use in a `Config`; errors are in the reader either way.
pub fn build(r: &mut Reader<'_>) -> Option<Config> {
    let name = name(r);
    let source = source(r);
    let trigger = trigger(r);
    let registry = registry::registry(r);
    let event_time = event_time(r);
    let types = types::types(r, &source.topics, event_time.as_ref());
    let known = types.as_ref().map_or(&[][..], |(types, _)| types.as_slice());
    let quality = quality(r, known);
    let windows = windows(r, known);
    let rows: Vec<&TableConfig> = known.iter().filter_map(|t| t.rows.as_ref()).collect();
    // Without a schema the types are not known; what is written is.
    let several = r.has("types");
    if windows.is_empty() && rows.is_empty() && (types.is_some() || !several && !r.has("rows")) {
        let problem = if several {
            "there is nothing to write: give a type a table, or add [[windows]]"
        } else {
            "there is nothing to write: add [rows], [[windows]] or both"
        };
        r.error("", problem);
    }
    if !windows.is_empty() && event_time.is_none() {
        r.error("windows.0", "windows need [event_time] with a column");
    }
    let dead_letters = dead_letters(r, rows.first().copied(), &windows);
    let dead_letter_topic = dead_letter_topic(r, &source.topics);
    let catalog = catalog::catalog(r);
    let maintenance = maintenance(r);
    let checkpoint_location =
        if r.has("checkpoint.location") { r.text("checkpoint.location") } else { Some(format!("checkpoints/{name}")) };
    check_location(r, "checkpoint.location", checkpoint_location.as_deref());
    let http = http(r);
    let retry = RetryConfig { strategy: strategy(r), deadlines: deadlines(r) };
    let execution = execution(r);
    let state = StateConfig { memory_budget_bytes: r.bytes("state.memory_budget").unwrap_or_default() };

    let (types, documents) = types?;
    let mut config = Config {
        name,
        source,
        trigger,
        types,
        registry,
        quality,
        event_time,
        windows,
        dead_letters,
        dead_letter_topic,
        catalog: catalog?,
        maintenance,
        checkpoint_location: checkpoint_location?,
        http,
        retry,
        execution,
        state,
        fingerprint: String::new(),
    };
    check_columns(r, &config);
    check_tables(r, &config);
    if r.errors.is_empty() {
        // Messages of the SQL compiler are of use only when the columns it looks for exist.
        let found = pipeline::compile_pipeline(&config.types, &config.quality.expectations, &config.windows);
        for (key, problem) in found {
            r.error(&key, problem);
        }
    }
    config.fingerprint = fingerprint::fingerprint(&config, documents);
    Some(config)
}

fn name(r: &mut Reader<'_>) -> String {
    r.required("name");
    let name = r.text("name");
    if let Some(name) = &name
        && !is_plain(name, 128)
    {
        r.error("name", format!("found {name:?}, allowed are up to 128 letters, digits, '.', '_' and '-'"));
    }
    name.unwrap_or_default()
}

/// Kafka's rule for topic names, and a good one for other names.
pub(super) fn is_plain(text: &str, max: usize) -> bool {
    !text.is_empty()
        && text.len() <= max
        && text != "."
        && text != ".."
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

fn source(r: &mut Reader<'_>) -> SourceConfig {
    r.required("source.bootstrap_servers");
    r.required("source.topics");
    let bootstrap_servers = r.text("source.bootstrap_servers");
    if bootstrap_servers.as_ref().is_some_and(|b| b.trim().is_empty()) {
        r.error("source.bootstrap_servers", "is empty; allowed is host:port, or several, separated by commas");
    }
    let before = r.errors.len();
    let topics = r.list("source.topics");
    let known = r.errors.len() == before;
    if topics.is_empty() && r.has("source.topics") && known {
        r.error("source.topics", "is empty; name at least one topic");
    }
    for (index, topic) in topics.iter().enumerate() {
        if !is_plain(topic, 249) {
            r.error(
                "source.topics",
                format!(
                    "found {topic:?}, allowed are letters, digits, '.', '_' and '-', up to 249; there are no patterns"
                ),
            );
        }
        if topics[..index].contains(topic) {
            r.error("source.topics", format!("{topic:?} is named twice"));
        }
    }
    let starting_offsets = r.starting_offsets("source.starting_offsets");
    if let Some(StartingOffsets::Explicit(offsets)) = starting_offsets.as_ref().filter(|_| known) {
        let mut strangers: Vec<&str> = offsets.keys().map(|tp| &*tp.topic).collect();
        strangers.dedup();
        for topic in strangers.into_iter().filter(|t| !topics.iter().any(|known| known == t)) {
            r.error("source.starting_offsets", format!("{topic:?} is not among source.topics"));
        }
    }
    let max_offsets = r.integer("source.max_offsets_per_trigger");
    let max_bytes = r.bytes("source.max_bytes_per_trigger");
    let min_offsets = r.integer("source.min_offsets_per_trigger").unwrap_or(0);
    if max_offsets == Some(0) {
        r.error("source.max_offsets_per_trigger", "found 0, allowed is 1 or more");
    }
    if max_bytes == Some(0) {
        r.error("source.max_bytes_per_trigger", "found 0, allowed is 1 or more");
    }
    if let Some(max) = max_offsets.filter(|max| *max > 0 && *max < min_offsets) {
        let problem = format!("found {min_offsets}, allowed is at most source.max_offsets_per_trigger, {max}");
        r.error("source.min_offsets_per_trigger", problem);
    }
    let max_trigger_delay = r.duration("source.max_trigger_delay").unwrap_or_default();
    let fail_on_data_loss = r.boolean("source.fail_on_data_loss").unwrap_or(true);
    let kafka: BTreeMap<String, String> = r.map("source.kafka").into_iter().collect();
    for (property, instead) in OWNED_PROPERTIES {
        if kafka.contains_key(*property) {
            r.error("source.kafka", format!("{property} is set by Floe: {instead}"));
        }
    }
    if let Some(level) =
        kafka.get("isolation.level").filter(|l| !matches!(l.as_str(), "read_committed" | "read_uncommitted"))
    {
        r.error(
            "source.kafka",
            format!("isolation.level: found {level:?}, allowed are read_committed, read_uncommitted"),
        );
    }
    SourceConfig {
        bootstrap_servers: bootstrap_servers.unwrap_or_default(),
        topics,
        starting_offsets: starting_offsets.unwrap_or(StartingOffsets::Earliest),
        max_offsets_per_trigger: max_offsets,
        max_bytes_per_trigger: max_bytes,
        min_offsets_per_trigger: min_offsets,
        max_trigger_delay,
        fail_on_data_loss,
        kafka,
    }
}

fn trigger(r: &mut Reader<'_>) -> Trigger {
    let interval = r.duration("trigger.interval").unwrap_or_default();
    match r.boolean("trigger.available_now") {
        // It wins over an interval, so that FLOE_TRIGGER__AVAILABLE_NOW=true drains a topic with any file.
        Some(true) => Trigger::AvailableNow,
        _ => Trigger::ProcessingTime(interval),
    }
}

fn quality(r: &mut Reader<'_>, types: &[TypeConfig]) -> QualityConfig {
    let mut expectations: Vec<ExpectationConfig> = Vec::new();
    for index in 0.. {
        let section = format!("quality.expect.{index}");
        if !r.has(&section) {
            break;
        }
        let key = format!("{section}.name");
        r.required(&key);
        r.required(&format!("{section}.sql"));
        let name = r.text(&key).unwrap_or_default();
        if r.has(&key) && !is_plain(&name, 128) {
            r.error(&key, format!("found {name:?}, allowed are up to 128 letters, digits, '.', '_' and '-'"));
        } else if !name.is_empty() && expectations.iter().any(|e| e.name == name) {
            r.error(&key, format!("{name:?} is the name of another expectation"));
        }
        let sql = r.text(&format!("{section}.sql")).unwrap_or_default();
        let key = format!("{section}.on_fail");
        let found = r.text(&key);
        let on_fail = OnFail::ALL.into_iter().find(|o| found.as_deref() == Some(o.name()));
        if let (Some(found), None) = (&found, on_fail) {
            let allowed = OnFail::ALL.map(|o| format!("{:?}", o.name())).join(", ");
            r.error(&key, format!("found {found:?}, allowed are {allowed}"));
        }
        let of = types::type_index(r, &format!("{section}.type"), types);
        expectations.push(ExpectationConfig { of, name, sql, on_fail: on_fail.unwrap_or(OnFail::Warn) });
    }
    let max_error_rate = r.share("quality.max_error_rate");
    let min_records = r.integer("quality.min_records").unwrap_or(1);
    let window = r.duration("quality.window").unwrap_or_default();
    let probe_interval = r.duration("quality.probe_interval").unwrap_or_default();
    for key in ["quality.min_records", "quality.window", "quality.probe_interval"] {
        if r.has(key) && !r.has("quality.max_error_rate") {
            r.error(key, "has no meaning without quality.max_error_rate");
        }
    }
    if min_records == 0 {
        r.error("quality.min_records", "found 0, allowed is 1 or more");
    }
    for (key, duration) in [("quality.window", window), ("quality.probe_interval", probe_interval)] {
        if duration.is_zero() && r.has(key) {
            r.error(key, "found 0, allowed is a duration above 0");
        }
    }
    let breaker =
        max_error_rate.map(|max_error_rate| BreakerConfig { max_error_rate, min_records, window, probe_interval });
    QualityConfig { expectations, breaker }
}

fn event_time(r: &mut Reader<'_>) -> Option<EventTimeConfig> {
    if !r.has("event_time") {
        return None;
    }
    r.required("event_time.column");
    let column = r.text("event_time.column").unwrap_or_default();
    let watermark_delay = r.duration("event_time.watermark_delay").unwrap_or_default();
    let max_future = r.duration("event_time.max_future");
    let idle_timeout = r.duration("event_time.idle_timeout").unwrap_or_default();
    let policy = r.text("event_time.policy");
    if !matches!(policy.as_deref(), Some("partition-min" | "global-max") | None) {
        let problem =
            format!("found {:?}, allowed are \"partition-min\", \"global-max\"", policy.as_deref().unwrap_or(""));
        r.error("event_time.policy", problem);
    }
    let policy = match policy.as_deref() {
        Some("global-max") => {
            if r.has("event_time.idle_timeout") {
                r.error("event_time.idle_timeout", "has no meaning with policy = \"global-max\"");
            }
            WatermarkPolicy::GlobalMax
        }
        _ => WatermarkPolicy::PartitionMin { idle_timeout_ms: idle_timeout.as_millis() as i64 },
    };
    Some(EventTimeConfig { column, watermark_delay, policy, max_future })
}

pub(super) fn table(r: &mut Reader<'_>, section: &str) -> TableConfig {
    let key = format!("{section}.table");
    r.required(&key);
    let table = r.text(&key);
    if let Some(table) = &table
        && !is_table_name(table)
    {
        r.error(&key, format!("found {table:?}, {TABLE_NAME}"));
    }
    TableConfig {
        table: table.unwrap_or_default(),
        partition_by: r.list(&format!("{section}.partition_by")),
        sort_by: r.list(&format!("{section}.sort_by")),
        properties: r.map(&format!("{section}.properties")).into_iter().collect(),
        // Only tables of rows have it.
        provenance: settings::find(&[section, "provenance"].join(".").split('.').map(String::from).collect::<Vec<_>>())
            .is_some()
            && r.boolean(&format!("{section}.provenance")).unwrap_or(true),
    }
}

const TABLE_NAME: &str = "allowed is namespace.table, each of letters, digits, '_' and '-'";

fn is_table_name(text: &str) -> bool {
    let part = |p: &str| is_plain(p, 255) && !p.contains('.');
    text.split_once('.').is_some_and(|(namespace, table)| part(namespace) && part(table))
}

fn windows(r: &mut Reader<'_>, types: &[TypeConfig]) -> Vec<WindowConfig> {
    let mut windows = Vec::new();
    for index in 0.. {
        let section = format!("windows.{index}");
        if !r.has(&section) {
            break;
        }
        let table = table(r, &section);
        let windowing = windowing(r, &section);
        let output_mode = output_mode(r, &section);
        let late_table = late_table(r, &section, &table);
        let key = format!("{section}.aggregates");
        let before = r.errors.len();
        let aggregates = r.map(&key);
        if aggregates.is_empty() && r.errors.len() == before {
            r.error(&key, "name at least one: events = \"count(*)\"");
        }
        let group_by = r.list(&format!("{section}.group_by"));
        let filter = r.text(&format!("{section}.filter"));
        // Without a windowing there is an error, and with an error no configuration.
        let of = types::type_index(r, &format!("{section}.type"), types);
        let Some(windowing) = windowing else { continue };
        windows.push(WindowConfig { of, table, windowing, output_mode, filter, late_table, group_by, aggregates });
    }
    windows
}

fn windowing(r: &mut Reader<'_>, section: &str) -> Option<Windowing> {
    let gap = format!("{section}.session_gap");
    if r.has(&gap) {
        return session(r, section, &gap);
    }
    let size = format!("{section}.size");
    r.required(&size);
    let size = r.duration(&size);
    let before = r.errors.len();
    let slide = r.duration(&format!("{section}.slide"));
    let start = r.duration(&format!("{section}.start")).unwrap_or_default();
    let time_zone = r.text(&format!("{section}.time_zone"));
    let sound = r.errors.len() == before;
    match Windowing::new(size?, slide, start, time_zone.as_deref()) {
        Ok(windowing) => Some(windowing).filter(|_| sound),
        Err(problems) => {
            for (key, problem) in problems {
                r.error(&format!("{section}.{key}"), problem);
            }
            None
        }
    }
}

fn session(r: &mut Reader<'_>, section: &str, key: &str) -> Option<Windowing> {
    for other in ["size", "slide", "start", "time_zone"] {
        let other = format!("{section}.{other}");
        if r.has(&other) {
            r.error(&other, "has no meaning with session_gap: sessions begin and end with their rows");
        }
    }
    let mode = format!("{section}.output_mode");
    if r.text(&mode).as_deref() == Some(OutputMode::Update.name()) {
        let problem = "sessions are written when they end: two that become one would leave the rows of both behind";
        r.error(&mode, problem);
    }
    let windowing = Windowing::session(r.duration(key)?);
    windowing.map_err(|problem| r.error(key, problem)).ok()
}

fn output_mode(r: &mut Reader<'_>, section: &str) -> OutputMode {
    let key = format!("{section}.output_mode");
    let Some(text) = r.text(&key) else { return OutputMode::Append };
    OutputMode::ALL.into_iter().find(|mode| mode.name() == text).unwrap_or_else(|| {
        r.error(&key, format!("found {text:?}, allowed are \"append\", \"update\""));
        OutputMode::Append
    })
}

/// Late rows always say where they are from, whatever the rows table does.
fn late_table(r: &mut Reader<'_>, section: &str, of: &TableConfig) -> Option<TableConfig> {
    let key = format!("{section}.late");
    let keeps = match r.text(&key).as_deref() {
        Some("table") => true,
        Some("drop") | None => false,
        Some(other) => {
            r.error(&key, format!("found {other:?}, allowed are \"drop\", \"table\""));
            return None;
        }
    };
    let key = format!("{section}.late_table");
    let named = r.text(&key);
    if named.is_some() && !keeps {
        r.error(&key, "has no meaning without late = \"table\"");
    }
    let table = named.unwrap_or_else(|| format!("{}_late", of.table));
    if r.has(&key) && !is_table_name(&table) {
        r.error(&key, format!("found {table:?}, {TABLE_NAME}"));
    }
    let properties = Default::default();
    keeps.then_some(TableConfig { table, partition_by: Vec::new(), sort_by: Vec::new(), properties, provenance: true })
}

fn dead_letters(r: &mut Reader<'_>, rows: Option<&TableConfig>, windows: &[WindowConfig]) -> TableConfig {
    if r.has("dead_letters.table") {
        return table(r, "dead_letters");
    }
    let first = rows.or(windows.first().map(|w| &w.table));
    let namespace = first.and_then(|t| t.table.split_once('.')).map_or("", |(namespace, _)| namespace);
    TableConfig {
        table: format!("{namespace}.dead_letters"),
        partition_by: r.list("dead_letters.partition_by"),
        sort_by: r.list("dead_letters.sort_by"),
        properties: r.map("dead_letters.properties").into_iter().collect(),
        provenance: false,
    }
}

fn dead_letter_topic(r: &mut Reader<'_>, read: &[String]) -> Option<String> {
    let topic = r.text("dead_letters.topic")?;
    if !is_plain(&topic, 249) {
        let problem = format!("found {topic:?}, allowed are letters, digits, '.', '_' and '-', up to 249");
        r.error("dead_letters.topic", problem);
    }
    if read.contains(&topic) {
        r.error(
            "dead_letters.topic",
            format!("{topic:?} is among source.topics: dead letters would be read again for ever"),
        );
    }
    Some(topic)
}

/// A file may be an hour old before the commit that names it: batches and other writers take their time.
const SHORTEST_ORPHAN_GRACE: Duration = Duration::from_secs(3_600);

fn maintenance(r: &mut Reader<'_>) -> MaintenanceConfig {
    let enabled = r.boolean("maintenance.enabled").unwrap_or(true);
    let mut duration = |name: &str| {
        let key = format!("maintenance.{name}");
        let found = r.duration(&key);
        if found.is_some_and(|d| d.is_zero()) {
            r.error(&key, "found 0, allowed is a duration above 0");
        }
        found.unwrap_or_default()
    };
    let interval = duration("interval");
    let time_budget = duration("time_budget");
    let max_snapshot_age = duration("max_snapshot_age");
    let compact_after = duration("compact_after");
    let orphan_grace = duration("orphan_grace");
    let batch = r.duration("deadlines.add_batch").unwrap_or_default();
    let shortest = SHORTEST_ORPHAN_GRACE.max(batch.saturating_mul(2));
    if orphan_grace < shortest && !orphan_grace.is_zero() {
        let problem =
            format!("found {orphan_grace:?}, allowed is {shortest:?} or more: an hour, and twice deadlines.add_batch");
        r.error("maintenance.orphan_grace", problem);
    }
    let mut count = |name: &str, least: u64| {
        let key = format!("maintenance.{name}");
        let found = r.integer(&key).unwrap_or(least);
        if found < least {
            r.error(&key, format!("found {found}, allowed is {least} or more"));
        }
        usize::try_from(found).unwrap_or(usize::MAX)
    };
    let max_snapshots = count("max_snapshots", 1);
    let compact_min_files = count("compact_min_files", 2);
    MaintenanceConfig {
        enabled,
        interval,
        time_budget,
        max_snapshot_age,
        max_snapshots,
        compact_min_files,
        compact_after,
        orphan_grace,
    }
}

pub(super) fn check_location(r: &mut Reader<'_>, key: &str, location: Option<&str>) {
    let Some(location) = location else { return };
    let scheme = location.split_once("://").map_or("file", |(scheme, _)| scheme);
    if location.trim().is_empty() {
        r.error(key, "is empty; allowed is a path, or a URL such as s3://bucket/folder");
    } else if !matches!(scheme, "file" | "s3") {
        r.error(key, format!("found {scheme}://, allowed is a path, file:// or s3://"));
    }
}

fn http(r: &mut Reader<'_>) -> HttpConfig {
    let listen = r.text("http.listen").unwrap_or_default();
    if listen.is_empty() {
        return HttpConfig { listen: None };
    }
    match listen.parse::<SocketAddr>() {
        Ok(address) => HttpConfig { listen: Some(address) },
        Err(_) => {
            let allowed = "allowed is address:port such as \"0.0.0.0:8080\", or \"\" for none";
            r.error("http.listen", format!("found {listen:?}, {allowed}"));
            HttpConfig { listen: None }
        }
    }
}

fn strategy(r: &mut Reader<'_>) -> Strategy {
    let initial = r.duration("retry.initial");
    let max = r.duration("retry.max");
    let kind = r.text("retry.strategy");
    if initial.is_some_and(|d| d.is_zero()) {
        r.error("retry.initial", "found 0, allowed is a duration above 0");
    }
    let (initial, max) = (initial.unwrap_or_default(), max.unwrap_or_default());
    if kind.as_deref() == Some("fixed") {
        if r.has("retry.max") {
            r.error("retry.max", "has no meaning with strategy \"fixed\", which always waits retry.initial");
        }
    } else if r.has("retry.max") && max < initial {
        r.error("retry.max", "is less than retry.initial");
    } else if max < initial && r.has("retry.initial") {
        r.error("retry.initial", format!("is more than retry.max, {max:?}"));
    }
    match kind.as_deref() {
        Some("linear") => Strategy::Linear { step: initial, max },
        Some("fixed") => Strategy::Fixed { delay: initial },
        Some("exponential") | None => Strategy::Exponential { initial, max },
        Some(other) => {
            r.error("retry.strategy", format!("found {other:?}, allowed are \"exponential\", \"linear\", \"fixed\""));
            Strategy::Exponential { initial, max }
        }
    }
}

fn deadlines(r: &mut Reader<'_>) -> Deadlines {
    let mut read = |stage: &str| {
        let key = format!("deadlines.{stage}");
        let deadline = r.duration(&key);
        if deadline.is_some_and(|d| d.is_zero()) {
            r.error(&key, "found 0, allowed is a duration above 0");
        }
        deadline.unwrap_or_default()
    };
    Deadlines {
        recover: read("recover"),
        latest_offsets: read("latest_offsets"),
        add_batch: read("add_batch"),
        checkpoint: read("checkpoint"),
        commit: read("commit"),
    }
}

const SMALLEST_BUFFER: u64 = 16 << 20;

fn execution(r: &mut Reader<'_>) -> ExecutionConfig {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let workers = match r.integer("execution.workers") {
        None => cores(),
        Some(n @ 1..=256) => n as usize,
        Some(n) => {
            r.error("execution.workers", format!("found {n}, allowed is 1 to 256"));
            1
        }
    };
    let buffer_bytes = r.bytes("execution.buffer").unwrap_or(SMALLEST_BUFFER);
    if buffer_bytes < SMALLEST_BUFFER {
        r.error("execution.buffer", "allowed is 16 MiB or more");
    }
    let shutdown_timeout = r.duration("execution.shutdown_timeout").unwrap_or_default();
    ExecutionConfig { workers, buffer_bytes, shutdown_timeout }
}

/// Columns are named where they exist and not twice.
fn check_columns(r: &mut Reader<'_>, config: &Config) {
    let mut of_types = Vec::with_capacity(config.types.len());
    for (index, of) in config.types.iter().enumerate() {
        // Where the settings of a type stand.
        let (transform, rows_section, event_time) = if of.name.is_empty() {
            ("transform.columns".to_string(), "rows".to_string(), "event_time.column".to_string())
        } else {
            let own = format!("types.{index}.event_time");
            let event_time = if r.has(&own) { own } else { "event_time.column".to_string() };
            (format!("types.{index}.columns"), format!("types.{index}"), event_time)
        };
        let fields: Vec<&str> = of.schema.arrow.fields().iter().map(|f| f.name().as_str()).collect();
        let mut columns = fields.clone();
        for (name, _) in &of.transform.columns {
            if columns.contains(&name.as_str()) {
                r.error(&transform, format!("{name:?} is a column of the schema; choose another name"));
            }
            columns.push(name);
        }
        if let Some(rows) = &of.rows {
            let mut all = columns.clone();
            if rows.provenance {
                for provenance in PROVENANCE {
                    if all.contains(&provenance) {
                        let problem = format!("{provenance} is already a column; rename it, or set provenance = false");
                        r.error(&format!("{rows_section}.provenance"), problem);
                    }
                    all.push(provenance);
                }
            }
            check_layout(r, &rows_section, rows, &all);
        }
        if let Some(column) = of.event_time.as_ref().filter(|column| !column.is_empty()) {
            match of.schema.arrow.field_with_name(column) {
                Err(_) => {
                    let problem = format!("{column:?} is no field of the schema; there are {}", fields.join(", "));
                    r.error(&event_time, problem);
                }
                Ok(field) if !matches!(field.data_type(), DataType::Timestamp(_, Some(_))) => {
                    let problem = format!("{column:?} is no time: it needs \"format\": \"date-time\" in the schema");
                    r.error(&event_time, problem);
                }
                Ok(_) => {}
            }
        }
        of_types.push(columns);
    }
    for (index, window) in config.windows.iter().enumerate() {
        let Some(columns) = of_types.get(window.of) else { continue };
        if let Some(of) =
            config.types.get(window.of).filter(|of| of.event_time.is_none() && config.event_time.is_some())
        {
            let column = config.event_time.as_ref().map_or("", |e| e.column.as_str());
            let problem = format!(
                "the schema of type {:?} has no field {column:?}; windows need one: name it in the type's event_time",
                of.name
            );
            r.error(&format!("windows.{index}"), problem);
        }
        let mut output = vec!["window_start", "window_end"];
        if window.output_mode == OutputMode::Update {
            output.push(REVISION);
        }
        let key = format!("windows.{index}.group_by");
        for text in &window.group_by {
            let column = match expression::key_name(text, columns) {
                Ok((_, name)) => name,
                Err(problem) => {
                    r.error(&key, problem);
                    continue;
                }
            };
            if output.contains(&column) {
                r.error(&key, format!("{column:?} would be in the table twice"));
            }
            output.push(column);
        }
        for (name, _) in &window.aggregates {
            if output.contains(&name.as_str()) {
                r.error(&format!("windows.{index}.aggregates"), format!("{name:?} would be in the table twice"));
            }
            output.push(name);
        }
        check_layout(r, &format!("windows.{index}"), &window.table, &output);
        if window.late_table.is_some() {
            for added in late::COLUMNS.iter().chain(&PROVENANCE).filter(|added| columns.contains(added)) {
                let problem = format!("late rows get a column {added}, which there is already; rename it");
                r.error(&format!("windows.{index}.late"), problem);
            }
        }
    }
    let dead = [
        "reason",
        "path",
        "message",
        "topic",
        "partition",
        "offset",
        "end_offset",
        "timestamp",
        "key",
        "payload",
        "headers",
        "batch_id",
        "recorded_at",
        "schema_fingerprint",
    ];
    check_layout(r, "dead_letters", &config.dead_letters, &dead);
}

fn check_layout(r: &mut Reader<'_>, section: &str, table: &TableConfig, columns: &[&str]) {
    let partitions = table.partition_by.iter().map(|t| ("partition_by", expression::partition_column(t)));
    let sorts = table.sort_by.iter().map(|t| ("sort_by", expression::sort_column(t)));
    for (name, column) in partitions.chain(sorts) {
        let key = format!("{section}.{name}");
        match column {
            Err(problem) => r.error(&key, problem),
            Ok(column) if !columns.contains(&column) => {
                r.error(&key, format!("{column:?} is no column of the table; there are {}", columns.join(", ")));
            }
            Ok(_) => {}
        }
    }
}

fn check_tables(r: &mut Reader<'_>, config: &Config) {
    let mut tables: Vec<(String, &str)> = Vec::new();
    for (index, of) in config.types.iter().enumerate() {
        let key = if of.name.is_empty() { "rows.table".to_string() } else { format!("types.{index}.table") };
        tables.extend(of.rows.iter().map(|t| (key.clone(), t.table.as_str())));
    }
    let windows = config.windows.iter().enumerate();
    tables.extend(windows.map(|(i, w)| (format!("windows.{i}.table"), w.table.table.as_str())));
    tables.push(("dead_letters.table".into(), &config.dead_letters.table));
    for (index, window) in config.windows.iter().enumerate() {
        let Some(late) = &window.late_table else { continue };
        // Late rows of all windows of a type look the same: they may share a table.
        if !config.windows[..index].iter().any(|w| w.late_table.as_ref() == Some(late) && w.of == window.of) {
            tables.push((format!("windows.{index}.late_table"), &late.table));
        }
    }
    for (index, (key, table)) in tables.iter().enumerate() {
        if let Some((other, _)) = tables[..index].iter().find(|(_, t)| t == table && !table.is_empty()) {
            r.error(key, format!("{table:?} is also {other}; every table needs a name of its own"));
        }
    }
}
