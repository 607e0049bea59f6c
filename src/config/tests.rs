use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::settings::{Kind, SETTINGS};
use super::*;
use crate::batch::TopicPartition;
use crate::retry::{Deadlines, Strategy};

const SCHEMA: &str = r#"{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "type": "object",
  "required": ["device_id", "event_timestamp"],
  "properties": {
    "device_id": {"type": "string"},
    "event_timestamp": {"type": "string", "format": "date-time"},
    "battery_level": {"type": "integer", "minimum": 0, "maximum": 100},
    "status": {"type": "string", "enum": ["ok", "test"]}
  }
}"#;

const MINIMAL: &str = r#"name = "telemetry"
[source]
bootstrap_servers = "localhost:9092"
topics = ["telemetry"]
[schema]
file = "schema.json"
[rows]
table = "telemetry.events"
"#;

const FULL: &str = r#"name = "telemetry"
[source]
bootstrap_servers = "localhost:9092"
topics = ["telemetry", "more"]
starting_offsets = { telemetry = { 0 = 1200, 1 = 0 } }
max_offsets_per_trigger = 2_000
max_bytes_per_trigger = "64 MiB"
min_offsets_per_trigger = 10
max_trigger_delay = "1 minute"
fail_on_data_loss = false
[source.kafka]
"security.protocol" = "SASL_SSL"
"sasl.password" = "hunter2"
sasl.username = "floe"
"session.timeout.ms" = 45000
[trigger]
interval = "5 seconds"
[schema]
file = "schema.json"
[transform]
filter = "status <> 'test'"
[transform.columns]
battery_low = "battery_level < 20"
a_first = "battery_level + 1"
[event_time]
column = "event_timestamp"
watermark_delay = "20 minutes"
idle_timeout = "2 minutes"
max_future = "1 hour"
[rows]
table = "telemetry.events"
partition_by = ["day(event_timestamp)", "bucket(16, device_id)"]
sort_by = ["device_id desc"]
provenance = false
[rows.properties]
"write.parquet.compression-codec" = "zstd"
[[windows]]
table = "telemetry.device_minutes"
size = "1 minute"
group_by = ["device_id", "battery_low"]
partition_by = ["day(window_start)"]
sort_by = ["device_id"]
[windows.aggregates]
events = "count(*)"
battery_avg = "avg(battery_level)"
[windows.properties]
owner = "team"
[dead_letters]
table = "telemetry.refused"
partition_by = ["day(recorded_at)"]
[catalog]
type = "sqlite"
path = "somewhere/catalog.db"
warehouse = "s3://bucket/warehouse"
[checkpoint]
location = "s3://bucket/checkpoint"
[http]
listen = ""
[retry]
strategy = "linear"
initial = "1 second"
max = "10 seconds"
[deadlines]
recover = "1 minute"
latest_offsets = "2 minutes"
add_batch = "3 minutes"
checkpoint = "4 minutes"
commit = "5 minutes"
[execution]
workers = 3
buffer = "32 MiB"
shutdown_timeout = "5 seconds"
[state]
memory_budget = "64 MiB"
[quality]
max_error_rate = 0.1
min_records = 500
window = "10 minutes"
probe_interval = "20 seconds"
[[quality.expect]]
name = "battery"
sql = "battery_level BETWEEN 0 AND 100"
on_fail = "dead_letter"
[[quality.expect]]
name = "status"
sql = "status IS NOT NULL"
"#;

struct Case {
    folder: tempfile::TempDir,
    env: BTreeMap<String, String>,
}

impl Case {
    fn new() -> Case {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("schema.json"), SCHEMA).unwrap();
        Case { folder, env: BTreeMap::new() }
    }

    fn with(env: &[(&str, &str)]) -> Case {
        let mut case = Case::new();
        case.env.extend(env.iter().map(|(k, v)| (k.to_string(), v.to_string())));
        case
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("pipeline.toml")
    }

    fn load(&self, text: &str) -> Result<Config, ConfigErrors> {
        fs::write(self.file(), text).unwrap();
        load(&self.file(), &self.env)
    }

    /// The errors with the folder's name taken out.
    fn errors(&self, text: &str) -> Vec<String> {
        let errors = self.load(text).expect_err("the configuration is wrong");
        let folder = format!("{}/", self.folder.path().display());
        errors.0.iter().map(|e| e.to_string().replace(&folder, "")).collect()
    }
}

fn load_ok(text: &str) -> Config {
    Case::new().load(text).unwrap()
}

#[test]
fn a_minimal_file_takes_every_default() {
    let c = load_ok(MINIMAL);
    assert_eq!(c.source.starting_offsets, StartingOffsets::Earliest);
    assert_eq!(c.source.max_offsets_per_trigger, Some(1_000_000));
    assert_eq!(c.source.max_bytes_per_trigger, None);
    assert_eq!(c.source.min_offsets_per_trigger, 0);
    assert_eq!(c.source.max_trigger_delay, Duration::from_secs(900));
    assert!(c.source.fail_on_data_loss);
    assert_eq!(c.trigger, Trigger::ProcessingTime(Duration::from_secs(10)));
    assert!(c.event_time.is_none());
    assert!(c.types[0].rows.clone().unwrap().provenance);
    assert_eq!(c.dead_letters.table, "telemetry.dead_letters");
    let CatalogConfig::Sqlite { path, warehouse } = c.catalog;
    assert_eq!((path.to_str().unwrap(), warehouse.as_str()), ("data/catalog.db", "data/warehouse"));
    assert_eq!(c.checkpoint_location, "checkpoints/telemetry");
    assert_eq!(c.http.listen, Some("127.0.0.1:8080".parse().unwrap()));
    let (initial, max) = (Duration::from_millis(200), Duration::from_secs(30));
    assert_eq!(c.retry.strategy, Strategy::Exponential { initial, max });
    assert_eq!(c.retry.deadlines, Deadlines::default());
    assert!(c.quality.expectations.is_empty() && c.quality.breaker.is_none());
    assert!(c.execution.workers >= 1);
    assert_eq!(c.execution.buffer_bytes, 256 << 20);
    assert_eq!(c.state.memory_budget_bytes, 1 << 30);
    assert_eq!(c.execution.shutdown_timeout, Duration::from_secs(25));
}

#[test]
fn a_full_file_is_read_as_it_is_written() {
    let c = load_ok(FULL);
    assert_eq!(c.source.topics, ["telemetry", "more"]);
    let offsets = [(TopicPartition::new("telemetry", 0), 1200), (TopicPartition::new("telemetry", 1), 0)];
    assert_eq!(c.source.starting_offsets, StartingOffsets::Explicit(offsets.into()));
    assert_eq!(c.source.max_offsets_per_trigger, Some(2_000));
    assert_eq!(c.source.max_bytes_per_trigger, Some(64 << 20));
    assert_eq!(c.source.min_offsets_per_trigger, 10);
    assert_eq!(c.source.max_trigger_delay, Duration::from_secs(60));
    assert!(!c.source.fail_on_data_loss);
    // Quoted or not, a property's name is the same, and a number is as good as a text.
    assert_eq!(c.source.kafka["security.protocol"], "SASL_SSL");
    assert_eq!(c.source.kafka["sasl.username"], "floe");
    assert_eq!(c.source.kafka["session.timeout.ms"], "45000");
    assert_eq!(c.trigger, Trigger::ProcessingTime(Duration::from_secs(5)));
    assert_eq!(c.types[0].transform.filter.as_deref(), Some("status <> 'test'"));
    let names: Vec<&str> = c.types[0].transform.columns.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(names, ["battery_low", "a_first"], "in the order of the file");
    let event_time = c.event_time.unwrap();
    assert_eq!(event_time.watermark_delay, Duration::from_secs(1_200));
    assert_eq!(event_time.policy, WatermarkPolicy::PartitionMin { idle_timeout_ms: 120_000 });
    assert_eq!(event_time.max_future, Some(Duration::from_secs(3_600)));
    let rows = c.types[0].rows.clone().unwrap();
    assert_eq!(rows.partition_by, ["day(event_timestamp)", "bucket(16, device_id)"]);
    assert_eq!(rows.sort_by, ["device_id desc"]);
    assert_eq!(rows.properties["write.parquet.compression-codec"], "zstd");
    assert!(!rows.provenance);
    assert_eq!(c.windows[0].windowing.size(), Duration::from_secs(60));
    assert_eq!(c.windows[0].group_by, ["device_id", "battery_low"]);
    assert_eq!(c.windows[0].aggregates[0], ("events".into(), "count(*)".into()));
    assert_eq!(c.windows[0].aggregates[1], ("battery_avg".into(), "avg(battery_level)".into()));
    assert_eq!(c.windows[0].table.properties["owner"], "team");
    assert_eq!(c.dead_letters.table, "telemetry.refused");
    assert_eq!(c.checkpoint_location, "s3://bucket/checkpoint");
    assert_eq!(c.http.listen, None);
    let (step, max) = (Duration::from_secs(1), Duration::from_secs(10));
    assert_eq!(c.retry.strategy, Strategy::Linear { step, max });
    assert_eq!(c.retry.deadlines.commit, Duration::from_secs(300));
    assert_eq!(c.execution.workers, 3);
    assert_eq!(c.execution.buffer_bytes, 32 << 20);
    assert_eq!(c.state.memory_budget_bytes, 64 << 20);
    let expected: Vec<_> = c.quality.expectations.iter().map(|e| (e.name.as_str(), e.on_fail)).collect();
    assert_eq!(expected, [("battery", OnFail::DeadLetter), ("status", OnFail::Warn)]);
    let (window, probe_interval) = (Duration::from_secs(600), Duration::from_secs(20));
    let breaker = BreakerConfig { max_error_rate: 0.1, min_records: 500, window, probe_interval };
    assert_eq!(c.quality.breaker, Some(breaker));
}

/// A sound value for a setting, other than the one in `FULL` and other than the default.
fn other_value(key: &str) -> &'static str {
    match key {
        "name" => "another",
        "source.bootstrap_servers" => "broker:9092",
        "source.topics" => "telemetry, third",
        "source.starting_offsets" => r#"{"telemetry": {"0": 7}}"#,
        "source.max_offsets_per_trigger" => "3_000",
        "source.max_bytes_per_trigger" => "1 GiB",
        "source.min_offsets_per_trigger" => "11",
        "source.fail_on_data_loss" => "true",
        "trigger.available_now" => "true",
        "schema.registry" => "https://other",
        "schema.registry_username" | "schema.registry_password" => "other",
        "schema.file" => "./schema.json",
        "schema.extra_column" => "_extra",
        "transform.filter" => "status = 'ok'",
        "event_time.column" => "other_time",
        "event_time.policy" => "partition-min",
        "rows.table" | "windows.*.table" | "dead_letters.table" => "telemetry.another",
        "rows.partition_by" => "truncate(2, device_id), status",
        "windows.*.partition_by" => "device_id",
        "dead_letters.partition_by" => "topic",
        "rows.sort_by" => "status",
        "windows.*.sort_by" => "window_start, device_id",
        "dead_letters.sort_by" => "offset",
        "dead_letters.topic" => "refused",
        "rows.provenance" => "true",
        "types.*.name" => "readouts",
        "types.*.topic" => "more",
        "types.*.field" => "type",
        "types.*.equals" => "other",
        "types.*.schema" => "other.json",
        "types.*.extra_column" => "_extra",
        "types.*.event_time" => "other_time",
        "types.*.filter" => "battery_level > 1",
        "types.*.table" => "telemetry.readings",
        "types.*.partition_by" => "device_id",
        "types.*.sort_by" => "device_id",
        "types.*.provenance" => "false",
        "windows.*.type" | "quality.expect.*.type" => "readings",
        "windows.*.group_by" => "device_id, status",
        "windows.*.time_zone" => "Europe/Berlin",
        "windows.*.filter" => "status = 'ok'",
        "windows.*.late" => "drop",
        "windows.*.late_table" => "telemetry.too_late",
        "quality.expect.*.name" => "level",
        "quality.expect.*.sql" => "battery_level > 1",
        "quality.expect.*.on_fail" => "fail",
        "quality.max_error_rate" => "0.25",
        "quality.min_records" => "600",
        "catalog.type" => "sqlite",
        "catalog.path" => "other.db",
        "catalog.warehouse" => "elsewhere",
        "maintenance.enabled" => "false",
        "maintenance.max_snapshots" | "maintenance.compact_min_files" => "77",
        "maintenance.orphan_grace" => "77 days",
        "checkpoint.location" => "nowhere",
        "http.listen" => "127.0.0.1:1",
        "retry.strategy" => "exponential",
        "retry.initial" => "2 seconds",
        "execution.workers" => "4",
        "execution.buffer" => "64 MiB",
        "state.memory_budget" => "3 MiB",
        _ => "77 seconds",
    }
}

/// The same with two message types, told apart by a member.
fn with_types(full: &str) -> String {
    let from = full.find("[schema]").unwrap();
    let to = full.find("[event_time]").unwrap();
    let rows = full.find("[rows]").unwrap();
    let windows = full.find("[[windows]]").unwrap();
    let types = r#"
[[types]]
name = "readings"
topic = "telemetry"
field = "kind"
equals = "reading"
schema = "schema.json"
table = "telemetry.events"
columns = { battery_low = "battery_level < 20" }
[[types]]
name = "alerts"
schema = "schema.json"
columns = { battery_low = "battery_level < 20" }
"#;
    let windows = full[windows..]
        .replace("[[windows]]", "[[windows]]\ntype = \"alerts\"")
        .replace("[[quality.expect]]", "[[quality.expect]]\ntype = \"alerts\"");
    [&full[..from], types, &full[to..rows], &windows].concat()
}

#[test]
fn every_setting_is_read_from_a_variable_and_from_a_file_that_a_variable_names() {
    let document =
        SCHEMA.replace("\"status\"", "\"other_time\": {\"type\": \"string\", \"format\": \"date-time\"}, \"status\"");
    let registry =
        "registry = \"http://r\"\nregistry_username = \"me\"\nregistry_password = \"hunter2\"\n[transform]\n";
    let windows = "size = \"1 day\"\nlate = \"table\"";
    let full = FULL.replace("[transform]\n", registry).replace("size = \"1 minute\"", windows);
    let shown = |c: &Config| format!("{c:?}").rsplit_once("fingerprint").unwrap().0.to_string();
    let of_types = with_types(&full);
    for setting in SETTINGS.iter().filter(|s| s.kind != Kind::Map) {
        let full = if setting.key.contains("type") && setting.key != "catalog.type" { &of_types } else { &full };
        let variable = format!("FLOE_{}", setting.key.replace('*', "0").replace('.', "__").to_uppercase());
        let value = other_value(setting.key);
        let mut case = Case::new();
        fs::write(case.folder.path().join("schema.json"), &document).unwrap();
        fs::write(case.folder.path().join("other.json"), SCHEMA.replace("\"status\"", "\"state\"")).unwrap();
        let before = shown(&case.load(full).unwrap());
        case.env.insert(variable.clone(), value.into());
        let by_variable = shown(&case.load(full).unwrap_or_else(|e| panic!("{variable}: {e}")));
        // A password is not shown.
        let same_by_nature =
            ["schema.file", "schema.registry_password", "event_time.policy", "catalog.type"].contains(&setting.key);
        assert_eq!(by_variable == before, same_by_nature, "{variable} has no effect");

        let mounted = case.folder.path().join("mounted");
        fs::write(&mounted, format!("{value}\n")).unwrap();
        case.env = BTreeMap::from([(format!("{variable}_FILE"), mounted.to_str().unwrap().to_string())]);
        assert_eq!(shown(&case.load(full).unwrap()), by_variable, "{variable}_FILE");

        case.env.insert(variable.clone(), value.into());
        let errors = case.errors(full);
        assert_eq!(errors, [format!("${variable}: both {variable} and {variable}_FILE are set; unset one of them")]);
    }
}

#[test]
fn entries_of_maps_have_variables_too() {
    let case = Case::with(&[
        ("FLOE_SOURCE__KAFKA__SASL_PASSWORD", "other"),
        ("FLOE_SOURCE__KAFKA__SSL_CA_LOCATION", "/ca.pem"),
        ("FLOE_TRANSFORM__COLUMNS__BATTERY_LOW", "battery_level < 10"),
        ("FLOE_ROWS__PROPERTIES__WRITE_PARQUET_COMPRESSION_CODEC", "gzip"),
        ("FLOE_WINDOWS__0__AGGREGATES__EVENTS", "count(status)"),
    ]);
    let c = case.load(FULL).unwrap();
    assert_eq!(c.source.kafka["sasl.password"], "other");
    assert_eq!(c.source.kafka["ssl.ca.location"], "/ca.pem");
    assert_eq!(c.types[0].transform.columns[0].1, "battery_level < 10");
    assert_eq!(c.types[0].rows.clone().unwrap().properties["write.parquet.compression-codec"], "gzip");
    assert_eq!(c.windows[0].aggregates[0].1, "count(status)");
}

#[test]
fn variables_of_spark_jobs_work_and_yield_to_the_setting_s_own() {
    let mut case = Case::with(&[
        ("KAFKA_BOOTSTRAP_SERVERS", "a:1"),
        ("KAFKA_TOPIC", "x,y"),
        ("CHECKPOINT_LOCATION", "chk"),
        ("FLOE_CHECKPOINT__LOCATION", "own"),
    ]);
    let c = case.load(MINIMAL).unwrap();
    assert_eq!(c.source.bootstrap_servers, "a:1");
    assert_eq!(c.source.topics, ["x", "y"]);
    assert_eq!(c.checkpoint_location, "own");
    case.env = BTreeMap::from([("KAFKA_TOPIC_FILE".into(), "/does/not/exist".into())]);
    let errors = case.errors(MINIMAL);
    assert!(errors[0].starts_with("$KAFKA_TOPIC_FILE: source.topics: cannot read /does/not/exist: "), "{errors:?}");
}

#[test]
fn the_environment_alone_can_add_a_section() {
    let case = Case::with(&[("FLOE_EVENT_TIME__COLUMN", "event_timestamp"), ("FLOE_HTTP__LISTEN", "")]);
    let c = case.load(MINIMAL).unwrap();
    assert_eq!(c.event_time.unwrap().column, "event_timestamp");
    assert_eq!(c.http.listen, None);
}

#[test]
fn variables_that_are_no_settings_are_let_through() {
    let case = Case::with(&[
        ("FLOE_CONFIG", "x"),
        ("FLOE_LOG", "debug"),
        ("FLOE_LOG_FORMAT", "json"),
        ("FLOE_FAILPOINT", "x:kill"),
        ("FLOE_TEST_KILLS", "20"),
        ("FLOE_SERVICE_HOST", "10.0.0.1"),
        ("FLOE_SERVICE_PORT_HTTP", "8080"),
        ("FLOE_PORT", "tcp://10.0.0.1:8080"),
        ("FLOE_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("PATH", "/bin"),
    ]);
    case.load(MINIMAL).unwrap();
}

#[test]
fn starting_offsets_in_every_spelling() {
    for (written, expected) in [
        (r#""earliest""#, StartingOffsets::Earliest),
        (r#""latest""#, StartingOffsets::Latest),
        (r#""1970-01-01T00:00:02Z""#, StartingOffsets::Timestamp(2_000)),
        ("1970-01-01T00:00:02Z", StartingOffsets::Timestamp(2_000)),
        ("{ telemetry = { 0 = 5 } }", StartingOffsets::Explicit([(TopicPartition::new("telemetry", 0), 5)].into())),
        (r#"'{"telemetry":{"0":5}}'"#, StartingOffsets::Explicit([(TopicPartition::new("telemetry", 0), 5)].into())),
    ] {
        let text = MINIMAL.replace("[schema]", &format!("starting_offsets = {written}\n[schema]"));
        assert_eq!(load_ok(&text).source.starting_offsets, expected, "{written}");
    }
}

/// What replaces what in `FULL`, and the one error that follows.
const MISTAKES: &[(&str, &str, &str)] = &[
    ("name = \"telemetry\"\n", "", "pipeline.toml: name: is required: a text"),
    ("name = \"telemetry\"", "name = \"a b\"", "pipeline.toml:1: name: found \"a b\", allowed are up to 128 letters"),
    ("name = \"telemetry\"", "name = 5", "pipeline.toml:1: name: found 5, allowed is a text"),
    (
        "topics = [\"telemetry\", \"more\"]\n",
        "topic = [\"telemetry\"]\ntopics = [\"telemetry\"]\n",
        "pipeline.toml:4: source.topic: unknown key; did you mean topics?",
    ),
    ("[trigger]", "[triger]\n[trigger]", "pipeline.toml:16: triger: unknown key; did you mean trigger?"),
    (
        "[trigger]",
        "[trigger]\nwatermark_delay = 1",
        "pipeline.toml:17: trigger.watermark_delay: unknown key; did you mean event_time.watermark_delay?",
    ),
    (
        "[trigger]",
        "[trigger]\nzzzzzzzz = 1",
        "pipeline.toml:17: trigger.zzzzzzzz: unknown key; allowed here: interval, available_now",
    ),
    ("size = \"1 minute\"", "size = \"1 minute\"\nhop = 1", "pipeline.toml:40: windows.0.hop: unknown key"),
    (
        "topics = [\"telemetry\", \"more\"]",
        "topics = 5",
        "pipeline.toml:4: source.topics: found 5, allowed is a list of texts",
    ),
    (
        "topics = [\"telemetry\", \"more\"]",
        "topics = [\"telemetry\", \"a*\"]",
        "pipeline.toml:4: source.topics: found \"a*\"",
    ),
    (
        "topics = [\"telemetry\", \"more\"]",
        "topics = [\"telemetry\", \"telemetry\"]",
        "pipeline.toml:4: source.topics: \"telemetry\" is named twice",
    ),
    (
        "topics = [\"telemetry\", \"more\"]",
        "topics = [\"more\"]",
        "pipeline.toml:5: source.starting_offsets: \"telemetry\" is not among source.topics",
    ),
    (
        "{ telemetry = { 0 = 1200, 1 = 0 } }",
        "{ telemetry = { 0 = -1 } }",
        "pipeline.toml:5: source.starting_offsets: found a table that does not fit, allowed is \"earliest\"",
    ),
    (
        "{ telemetry = { 0 = 1200, 1 = 0 } }",
        "\"first\"",
        "pipeline.toml:5: source.starting_offsets: found \"first\", allowed is \"earliest\"",
    ),
    (
        "= 2_000",
        "= \"2_000\"",
        "pipeline.toml:6: source.max_offsets_per_trigger: found \"2_000\", allowed is a whole number",
    ),
    ("= 2_000", "= -1", "pipeline.toml:6: source.max_offsets_per_trigger: found -1, allowed is a whole number"),
    (
        "= 2_000",
        "= 1.5",
        "pipeline.toml:6: source.max_offsets_per_trigger: found a number with a fraction, allowed is a whole number",
    ),
    ("= 2_000", "= 0", "pipeline.toml:6: source.max_offsets_per_trigger: found 0, allowed is 1 or more"),
    (
        "= 2_000",
        "= 5",
        "pipeline.toml:8: source.min_offsets_per_trigger: found 10, allowed is at most source.max_offsets_per_trigger, 5",
    ),
    (
        "\"64 MiB\"",
        "\"64 parsecs\"",
        "pipeline.toml:7: source.max_bytes_per_trigger: found \"64 parsecs\", allowed is a size such as",
    ),
    ("\"64 MiB\"", "0", "pipeline.toml:7: source.max_bytes_per_trigger: found 0, allowed is 1 or more"),
    (
        "fail_on_data_loss = false",
        "fail_on_data_loss = \"no\"",
        "pipeline.toml:10: source.fail_on_data_loss: found \"no\", allowed is true or false",
    ),
    (
        "\"session.timeout.ms\"",
        "\"enable.auto.commit\"",
        "pipeline.toml:11: source.kafka: enable.auto.commit is set by Floe: offsets are kept in the checkpoint",
    ),
    (
        "\"session.timeout.ms\" = 45000",
        "\"isolation.level\" = \"x\"",
        "pipeline.toml:11: source.kafka: isolation.level: found \"x\"",
    ),
    (
        "\"hunter2\"",
        "[\"hunter2\"]",
        "pipeline.toml:13: source.kafka.sasl.password: found a list that does not fit, allowed is a text",
    ),
    (
        "interval = \"5 seconds\"",
        "interval = \"5\"",
        "pipeline.toml:17: trigger.interval: found \"5\", allowed is a duration such as",
    ),
    (
        "interval = \"5 seconds\"",
        "interval = 5",
        "pipeline.toml:17: trigger.interval: found 5, allowed is a duration such as",
    ),
    ("file = \"schema.json\"", "file = \"none.json\"", "pipeline.toml:19: schema.file: cannot read none.json: "),
    ("file = \"schema.json\"", "file = \"broken.json\"", "broken.json: "),
    (
        "battery_low = \"battery_level < 20\"",
        "battery_low = \"1\"\nstatus = \"'x'\"",
        "pipeline.toml:22: transform.columns: \"status\" is a column of the schema",
    ),
    (
        "column = \"event_timestamp\"",
        "column = \"event_time\"",
        "pipeline.toml:26: event_time.column: \"event_time\" is no field of the schema; there are ",
    ),
    (
        "column = \"event_timestamp\"",
        "column = \"device_id\"",
        "pipeline.toml:26: event_time.column: \"device_id\" is no time: it needs",
    ),
    ("column = \"event_timestamp\"\n", "", "pipeline.toml:25: event_time.column: is required: a text"),
    (
        "idle_timeout = \"2 minutes\"",
        "idle_timeout = \"2 minutes\"\npolicy = \"global-max\"",
        "pipeline.toml:28: event_time.idle_timeout: has no meaning with policy = \"global-max\"",
    ),
    (
        "idle_timeout = \"2 minutes\"",
        "policy = \"x\"",
        "pipeline.toml:28: event_time.policy: found \"x\", allowed are \"partition-min\", \"global-max\"",
    ),
    (
        "table = \"telemetry.events\"",
        "table = \"events\"",
        "pipeline.toml:31: rows.table: found \"events\", allowed is namespace.table",
    ),
    (
        "table = \"telemetry.events\"",
        "table = \"telemetry.device_minutes\"",
        "pipeline.toml:38: windows.0.table: \"telemetry.device_minutes\" is also rows.table",
    ),
    (
        "table = \"telemetry.refused\"",
        "table = \"telemetry.events\"",
        "pipeline.toml:49: dead_letters.table: \"telemetry.events\" is also rows.table",
    ),
    (
        "day(event_timestamp)",
        "week(event_timestamp)",
        "pipeline.toml:32: rows.partition_by: \"week\" is no partition function",
    ),
    (
        "day(event_timestamp)",
        "day(_kafka_timestamp)",
        "pipeline.toml:32: rows.partition_by: \"_kafka_timestamp\" is no column of the table",
    ),
    (
        "day(window_start)",
        "day(event_timestamp)",
        "pipeline.toml:41: windows.0.partition_by: \"event_timestamp\" is no column of the table",
    ),
    ("device_id desc", "device_id down", "pipeline.toml:33: rows.sort_by: \"device_id down\" is no sort key"),
    (
        "size = \"1 minute\"",
        "size = \"0 minutes\"",
        "pipeline.toml:39: windows.0.size: found 0, allowed is a duration above 0",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 minute\"\nslide = \"7 minutes\"",
        "pipeline.toml:40: windows.0.slide: is longer than size: rows between two windows would be in none",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 minute\"\nslide = \"2 ms\"",
        "pipeline.toml:40: windows.0.slide: puts every row into 30000 windows; allowed are up to 10000",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 minute\"\nstart = \"1 minute\"",
        "pipeline.toml:40: windows.0.start: must be shorter than size",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 day\"\ntime_zone = \"Germany\"",
        "pipeline.toml:40: windows.0.time_zone: found \"Germany\", allowed is a name of the IANA time zone database",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 minute\"\ntime_zone = \"Europe/Berlin\"",
        "pipeline.toml:39: windows.0.size: must be whole days or weeks in a time_zone",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 minute\"\nfilter = \"battery_level\"",
        "pipeline.toml:40: windows.0.filter: \"battery_level\": a filter is true or false",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 minute\"\nlate = \"keep\"",
        "pipeline.toml:40: windows.0.late: found \"keep\", allowed are \"drop\", \"table\"",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 minute\"\nlate_table = \"telemetry.late\"",
        "pipeline.toml:40: windows.0.late_table: has no meaning without late = \"table\"",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 minute\"\nlate = \"table\"\nlate_table = \"telemetry.events\"",
        "pipeline.toml:41: windows.0.late_table: \"telemetry.events\" is also rows.table",
    ),
    (
        "size = \"1 minute\"",
        "size = \"1 minute\"\nlate = \"table\"\nlate_table = \"late\"",
        "pipeline.toml:41: windows.0.late_table: found \"late\", allowed is namespace.table",
    ),
    ("size = \"1 minute\"\n", "", "pipeline.toml:37: windows.0.size: is required: a duration such as"),
    (
        "[\"device_id\", \"battery_low\"]",
        "[\"device_id\", \"device\"]",
        "pipeline.toml:40: windows.0.group_by: \"device\" is no column; there are ",
    ),
    (
        "events = \"count(*)\"\nbattery_avg = \"avg(battery_level)\"\n",
        "",
        "pipeline.toml:43: windows.0.aggregates: name at least one",
    ),
    (
        "events = \"count(*)\"",
        "device_id = \"count(*)\"",
        "pipeline.toml:43: windows.0.aggregates: \"device_id\" would be in the table twice",
    ),
    ("type = \"sqlite\"", "type = \"rest\"", "pipeline.toml:52: catalog.type: \"rest\" comes with a later version"),
    ("type = \"sqlite\"", "type = \"hive\"", "pipeline.toml:52: catalog.type: found \"hive\", allowed is \"sqlite\""),
    (
        "s3://bucket/warehouse",
        "ftp://x",
        "pipeline.toml:54: catalog.warehouse: found ftp://, allowed is a path, file:// or s3://",
    ),
    (
        "listen = \"\"",
        "listen = \"localhost\"",
        "pipeline.toml:58: http.listen: found \"localhost\", allowed is address:port",
    ),
    (
        "strategy = \"linear\"",
        "strategy = \"random\"",
        "pipeline.toml:60: retry.strategy: found \"random\", allowed are \"exponential\"",
    ),
    (
        "strategy = \"linear\"",
        "strategy = \"fixed\"",
        "pipeline.toml:62: retry.max: has no meaning with strategy \"fixed\"",
    ),
    (
        "initial = \"1 second\"",
        "initial = \"0 s\"",
        "pipeline.toml:61: retry.initial: found 0, allowed is a duration above 0",
    ),
    ("initial = \"1 second\"", "initial = \"1 minute\"", "pipeline.toml:62: retry.max: is less than retry.initial"),
    ("commit = \"5 minutes\"", "commit = \"0 s\"", "pipeline.toml:68: deadlines.commit: found 0"),
    ("workers = 3", "workers = 0", "pipeline.toml:70: execution.workers: found 0, allowed is 1 to 256"),
    ("buffer = \"32 MiB\"", "buffer = \"1 MiB\"", "pipeline.toml:71: execution.buffer: allowed is 16 MiB or more"),
    ("[execution]", "[execution]\nworkers = 1 2", "pipeline.toml:70: not valid TOML: "),
    ("[execution]", "deadlines.x = 1\n[execution]", "pipeline.toml:69: deadlines.deadlines: unknown key"),
];

#[test]
fn every_mistake_is_one_error_with_its_place() {
    let mut wrong = Vec::new();
    for (from, to, expected) in MISTAKES {
        let case = Case::new();
        fs::write(case.folder.path().join("broken.json"), "{").unwrap();
        assert!(FULL.contains(from), "{from}");
        let text = FULL.replacen(from, to, 1);
        let errors = case.errors(&text);
        // A file that is no TOML may lead to more.
        if !errors[0].starts_with(expected) || (errors.len() > 1 && !errors[0].contains("TOML")) {
            wrong.push(format!("{from} → {to}\n  expected {expected}\n  found {errors:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn mistakes_of_the_environment_name_the_variable() {
    for (name, value, expected) in [
        (
            "FLOE_TRIGGER__INTERVAL",
            "5",
            "$FLOE_TRIGGER__INTERVAL: trigger.interval: found \"5\", allowed is a duration",
        ),
        (
            "FLOE_TRIGER__INTERVAL",
            "5 s",
            "$FLOE_TRIGER__INTERVAL: names no setting; did you mean FLOE_TRIGGER__INTERVAL?",
        ),
        (
            "FLOE_TRIGGER_INTERVAL",
            "5 s",
            "$FLOE_TRIGGER_INTERVAL: names no setting; did you mean FLOE_TRIGGER__INTERVAL?",
        ),
        ("FLOE_XYZ", "5", "$FLOE_XYZ: names no setting; the name is the setting's path in capitals"),
        (
            "FLOE_WINDOWS__1__SIZE",
            "1 s",
            "$FLOE_WINDOWS__1__SIZE: there is no window 1: the file has 1, counted from 0",
        ),
        (
            "FLOE_TRANSFORM__COLUMNS__NEW",
            "1",
            "$FLOE_TRANSFORM__COLUMNS__NEW: the file has no entry of that name in transform.columns",
        ),
        (
            "FLOE_SOURCE__KAFKA__AUTO_OFFSET_RESET",
            "x",
            "pipeline.toml:11: source.kafka: auto.offset.reset is set by Floe",
        ),
        (
            "FLOE_HTTP__LISTEN_FILE",
            "/does/not/exist",
            "$FLOE_HTTP__LISTEN_FILE: http.listen: cannot read /does/not/exist: ",
        ),
    ] {
        let errors = Case::with(&[(name, value)]).errors(FULL);
        assert!(errors.len() == 1 && errors[0].starts_with(expected), "{name}: expected {expected}, found {errors:#?}");
    }
}

#[test]
fn all_errors_are_reported_at_once_in_the_order_of_the_file() {
    let mut text = FULL.replace("size = \"1 minute\"", "size = \"soon\"").replace("workers = 3", "worker = 3");
    text = text.replace("name = \"telemetry\"\n", "nam = \"telemetry\"\n");
    let case = Case::with(&[("FLOE_X", "1")]);
    let errors = case.errors(&text);
    let keys: Vec<&str> = errors.iter().map(|e| e.split(": ").nth(1).unwrap()).collect();
    assert_eq!(keys, ["name", "nam", "windows.0.size", "execution.worker", keys[4]], "{errors:#?}");
    assert!(errors[4].starts_with("$FLOE_X: "));
}

#[test]
fn sections_of_the_wrong_shape() {
    for (text, expected) in [
        ("source = 5", "source: found 5, allowed is a section"),
        ("[windows]\ntable = \"a.b\"", "windows: write every window as a section [[windows]]"),
        ("[quality]\nexpect = 1", "quality.expect: write every entry as a section [[quality.expect]]"),
        ("windows = [1]", "windows.0: found 1, allowed is a section"),
    ] {
        let errors = Case::new().errors(text);
        assert!(errors.iter().any(|e| e.contains(expected)), "{text}: {errors:#?}");
    }
    let errors = Case::new().errors("");
    assert!(errors.iter().any(|e| e.contains("there is nothing to write: add [rows], [[windows]] or both")));
    let errors = Case::new().errors(&FULL.replace("[event_time]", "[event_tim]"));
    assert!(errors.iter().any(|e| e.contains("windows need [event_time] with a column")), "{errors:#?}");
}

#[test]
fn secrets_are_not_shown() {
    let mut case = Case::new();
    let mounted = case.folder.path().join("secret");
    fs::write(&mounted, "hunter3\n").unwrap();
    case.env.insert("FLOE_SOURCE__KAFKA__SASL_PASSWORD_FILE".into(), mounted.to_str().unwrap().into());
    let config = case.load(FULL).unwrap();
    assert_eq!(config.source.kafka["sasl.password"], "hunter3");
    let shown = format!("{config:?}");
    assert!(!shown.contains("hunter") && shown.contains("SASL_SSL"), "{shown}");
    // A secret mounted to the wrong name.
    case.env = BTreeMap::from([("FLOE_TRIGGER__INTERVAL_FILE".into(), mounted.to_str().unwrap().into())]);
    let errors = case.errors(FULL);
    assert!(!errors[0].contains("hunter") && errors[0].contains("found a text"), "{errors:?}");
    for text in [FULL.replace("\"hunter2\"", "[\"hunter2\"]"), FULL.replace("\"hunter2\"", "hunter2")] {
        assert!(!Case::new().errors(&text).join("\n").contains("hunter"));
    }
}

#[test]
fn the_fingerprint_changes_with_what_a_batch_means_and_with_nothing_else() {
    let before = load_ok(FULL).fingerprint;
    assert_eq!(before.len(), 64);
    for (from, to, same) in [
        ("localhost:9092", "other:9092", true),
        ("interval = \"5 seconds\"", "interval = \"6 seconds\"", true),
        ("= 2_000", "= 3_000", true),
        ("strategy = \"linear\"", "strategy = \"exponential\"", true),
        ("commit = \"5 minutes\"", "commit = \"6 minutes\"", true),
        ("workers = 3", "workers = 2", true),
        ("hunter2", "other", true),
        ("max_error_rate = 0.1", "max_error_rate = 0.2", true),
        ("BETWEEN 0 AND 100", "BETWEEN 0 AND 99", false),
        ("\"dead_letter\"", "\"drop\"", false),
        ("status <> 'test'", "status = 'ok'", false),
        ("battery_level < 20", "battery_level < 10", false),
        ("\"20 minutes\"", "\"21 minutes\"", false),
        ("size = \"1 minute\"", "size = \"2 minutes\"", false),
        ("count(*)", "count(status)", false),
        ("telemetry.events", "telemetry.other", false),
        ("telemetry.refused", "telemetry.other", false),
        ("provenance = false", "provenance = true", false),
    ] {
        let after = load_ok(&FULL.replacen(from, to, 1)).fingerprint;
        assert_eq!(before == after, same, "{from} → {to}");
    }
    let case = Case::new();
    let file = case.folder.path().join("schema.json");
    fs::write(&file, SCHEMA.replace('\n', " ")).unwrap();
    assert_eq!(case.load(FULL).unwrap().fingerprint, before, "layout has no meaning");
    fs::write(&file, SCHEMA.replace("100", "99")).unwrap();
    assert_ne!(case.load(FULL).unwrap().fingerprint, before);
}

#[test]
fn the_worked_example_is_sound() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/telemetry.toml");
    let config = load(&file, &BTreeMap::new()).unwrap();
    assert_eq!(config.tables().count(), 3);
}

#[test]
fn sql_that_does_not_compile_is_a_mistake_of_its_setting() {
    for (from, to, expected) in [
        ("status <> 'test'", "stat <> 'test'", "pipeline.toml:21: transform.filter: \"stat <> 'test'\": "),
        ("status <> 'test'", "status <>", "pipeline.toml:21: transform.filter: "),
        ("battery_level + 1", "battery_level +", "pipeline.toml:24: transform.columns.a_first: "),
        ("avg(battery_level)", "avg(battery)", "pipeline.toml:45: windows.0.aggregates.battery_avg: "),
        ("avg(battery_level)", "median(battery_level)", "pipeline.toml:45: windows.0.aggregates.battery_avg: "),
    ] {
        let errors = Case::new().errors(&FULL.replacen(from, to, 1));
        assert!(errors.len() == 1 && errors[0].starts_with(expected), "{to}: expected {expected}, found {errors:#?}");
    }
}

#[test]
fn mistakes_in_quality() {
    for (from, to, expected) in [
        ("= 0.1\n", "= 1\n", "quality.max_error_rate: found 1, allowed is a share from 0 to below 1"),
        ("= 0.1\n", "= 1.5\n", "quality.max_error_rate: found a number with a fraction, allowed is a share"),
        ("= 0.1\n", "= \"0.1\"\n", "quality.max_error_rate: found \"0.1\", allowed is a share"),
        ("= 500\n", "= 0\n", "quality.min_records: found 0, allowed is 1 or more"),
        ("window = \"10 minutes\"", "window = \"0 s\"", "quality.window: found 0, allowed is a duration above 0"),
        (
            "on_fail = \"dead_letter\"",
            "on_fail = \"dlq\"",
            "quality.expect.0.on_fail: found \"dlq\", allowed are \"warn\"",
        ),
        ("name = \"status\"", "name = \"battery\"", "quality.expect.1.name: \"battery\" is the name of another"),
        ("name = \"status\"", "nam = \"status\"", "quality.expect.1.nam: unknown key; did you mean name?"),
        ("status IS NOT NULL", "stat IS NOT NULL", "quality.expect.1.sql: \"stat IS NOT NULL\": "),
        ("status IS NOT NULL", "status", "quality.expect.1.sql: \"status\": an expectation is true or false"),
    ] {
        let errors = Case::new().errors(&FULL.replacen(from, to, 1));
        assert!(errors.iter().any(|e| e.contains(expected)), "{to}: expected {expected}, found {errors:#?}");
    }
    let errors = Case::new().errors(&FULL.replacen("max_error_rate = 0.1\n", "", 1));
    assert_eq!(errors.len(), 3, "{errors:#?}");
    assert!(errors[0].contains("has no meaning without quality.max_error_rate"));
    let errors = Case::with(&[("FLOE_QUALITY__EXPECT__2__SQL", "true")]).errors(FULL);
    assert_eq!(errors, ["$FLOE_QUALITY__EXPECT__2__SQL: there is no quality.expect 2: the file has 2, counted from 0"]);
}

#[test]
fn the_guarantee_follows_from_the_configuration() {
    assert_eq!(load_ok(MINIMAL).guarantee(), "exactly once; 2 tables appear together (sqlite)");
    let text = FULL.replace("\"session.timeout.ms\" = 45000", "\"isolation.level\" = \"read_uncommitted\"");
    let guarantee = load_ok(&text).guarantee();
    assert!(guarantee.contains("aborted transactions included, but offsets that expire"), "{guarantee}");
}

#[test]
fn every_setting_is_in_the_readme_with_its_default() {
    let readme = include_str!("../../README.md");
    for setting in SETTINGS {
        let key = setting.key.replace(".*.", "[].");
        let line = readme.lines().find(|l| l.starts_with(&format!("| `{key}` |")));
        let line = line.unwrap_or_else(|| panic!("{key} is not in the README's table"));
        if let Some(default) = setting.default {
            assert!(line.contains(&format!("`{default}`")), "{key}: the README has another default: {line}");
        }
    }
}

#[test]
fn the_readme_knows_every_reason_and_no_metric_that_is_not_there() {
    let readme = include_str!("../../README.md");
    for reason in crate::dead_letter::Reason::ALL {
        assert!(readme.contains(&format!("| `{}` |", reason.code())), "{}", reason.code());
    }
    let metrics = include_str!("../telemetry/metrics.rs");
    for name in readme.split('`').filter(|word| word.starts_with("floe_")) {
        assert!(metrics.contains(&format!("\"{name}\"")), "{name}");
    }
}

#[test]
fn a_registry_is_read_and_its_password_is_never_shown() {
    let with = |lines: &str| MINIMAL.replace("file = \"schema.json\"\n", &format!("file = \"schema.json\"\n{lines}\n"));
    let config = load_ok(&with("registry = \"https://me:hunter2@registry:8081/path\""));
    let registry = config.registry.as_ref().unwrap();
    assert_eq!(registry.url.as_str(), "https://me:hunter2@registry:8081/path/");
    assert_eq!(registry.place(), "https://registry:8081/path/");
    assert!(!format!("{config:?}").contains("hunter2"));
    assert_ne!(config.fingerprint, load_ok(MINIMAL).fingerprint);
    let text = with("registry = \"http://r\"\nregistry_username = \"me\"\nregistry_password = \"hunter2\"");
    let config = load_ok(&text);
    let expected = Some(("me".to_string(), Some("hunter2".to_string())));
    assert_eq!(config.registry.as_ref().unwrap().credentials, expected);
    assert!(!format!("{config:?}").contains("hunter2"));
    for lines in [
        "registry = \"registry:hunter2\"",
        "registry = \"http://me:hunter2@\"",
        "registry = \"http://me:hunter2@r\"\nregistry_username = \"me\"",
        "registry = \"http://me:hunter2@r/?a=b\"",
        "registry_password = \"hunter2\"",
        "registry_username = \"me\"",
        "registry = \"http://r\"\nregistry_username = \"me\"\nregistry_password = [\"hunter2\"]",
    ] {
        let errors = Case::new().errors(&with(lines));
        assert!(errors.len() == 1 && errors[0].contains("schema.registry"), "{lines}: {errors:#?}");
        assert!(!errors[0].contains("hunter2"), "{errors:#?}");
    }
}
