//! `floe check`: after the configuration itself, everything that it names is tried out, one probe and one line each.
//!
//! Leaves nothing behind: probe objects are deleted, no table, catalog or checkpoint is created.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use object_store::{ObjectStoreExt, PutPayload};
use rusqlite::{Connection, OpenFlags};

use super::Error;
use crate::batch::{OffsetRange, Ranges};
use crate::checkpoint::Checkpoint;
use crate::config::{CatalogConfig, Config, ExpectationConfig, RegistryConfig, TypeConfig};
use crate::decode::framing::schema_id;
use crate::decode::registry::{Registry, Writer};
use crate::error::{Kind, chain};
use crate::pipeline::Pipeline;
use crate::sink::iceberg::{self, IcebergSink, Probed, TableStep};
use crate::source::kafka::{ChunkSettings, KafkaSource, QueryNames};
use crate::source::{self, Available, Source};
use crate::storage::Location;
use crate::transform::Transform;

/// Stores and brokers that cannot be reached are tried for long by their clients; a person is waiting here.
const PATIENCE: Duration = Duration::from_secs(15);

/// Records of each partition that are looked at.
const NEWEST: i64 = 3;

/// What a probe found, or what is wrong and what to do about it. Several lines where there is more to say.
type Finding = Result<String, String>;

pub async fn check(config: &Config) -> Result<(), Error> {
    let mut failed = 0;
    let mut probes = 0;
    let mut report = |what: &str, finding: Finding| {
        probes += 1;
        failed += usize::from(finding.is_err());
        let (mark, text) = match &finding {
            Ok(text) => ("ok  ", text),
            Err(text) => ("FAIL", text),
        };
        for line in text.lines() {
            say(&format!("{mark}  {what:<11} {line}"));
        }
    };
    report("config", Ok(format!("pipeline {:?}, fingerprint {}", config.name, &config.fingerprint[..12])));
    for of in &config.types {
        let named = !of.name.is_empty();
        report(if named { "type" } else { "schema" }, Ok(if named { message_type(of) } else { columns(of) }));
    }
    if !config.quality.expectations.is_empty() {
        report("expect", Ok(expectations(config)));
    }
    if let CatalogConfig::Sqlite { .. } = &config.catalog {
        report("guarantee", Ok(config.guarantee(None)));
    }
    let broker = in_time(broker(config)).await;
    let reachable = broker.is_ok();
    report("broker", broker);
    if reachable {
        report("payloads", in_time(payloads(config)).await);
    }
    if let Some(topic) = &config.dead_letter_topic {
        report("dlq topic", in_time(dead_letter_topic(config, topic)).await);
    }
    match &config.catalog {
        CatalogConfig::Sqlite { path, warehouse } => {
            report("catalog", in_time(catalog(config, path)).await);
            report("tables", in_time(tables(config)).await);
            report("warehouse", in_time(warehouse_store(warehouse)).await);
        }
        CatalogConfig::Rest(rest) => match in_time(rest_catalog(config)).await {
            Ok(probed) => {
                let auth = rest.auth.name();
                report("catalog", Ok(format!("{}: answers (authentication: {auth})", rest.uri)));
                report("guarantee", Ok(config.guarantee(Some(probed.together))));
                report("tables", in_time(tables(config)).await);
                for (table, found) in probed.tables {
                    let told = |text| format!("{table}: {text}");
                    report("warehouse", found.map(told).map_err(told));
                }
            }
            Err(problem) => report("catalog", Err(problem)),
        },
    }
    report("checkpoint", in_time(checkpoint(config)).await);
    if failed == 0 { Ok(()) } else { Err(Error::Check { failed, probes }) }
}

#[allow(clippy::print_stdout)]
fn say(line: &str) {
    println!("{line}");
}

async fn in_time<T>(probe: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let late = || Err(format!("no answer within {} seconds; is it reachable from here?", PATIENCE.as_secs()));
    tokio::time::timeout(PATIENCE, probe).await.unwrap_or_else(|_| late())
}

/// Blocking clients have a thread of their own, which is left behind when it takes too long.
async fn blocking<T: Send + 'static>(probe: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(probe).await.unwrap_or_else(|e| Err(format!("the probe itself failed: {e}")))
}

fn columns(of: &TypeConfig) -> String {
    // The configuration has been compiled before; what does not compile now is shown without its derived columns.
    let derived = Transform::compile(&of.transform, &of.schema.arrow).map(|t| t.output_schema());
    let schema = derived.unwrap_or_else(|_| of.schema.arrow.clone());
    let mut text = format!("{} columns:", schema.fields().len());
    for field in schema.fields() {
        let null = if field.is_nullable() { "" } else { " not null" };
        // Writing to a string cannot fail.
        let _ = write!(text, " {} {}{null},", field.name(), type_name(field.data_type()));
    }
    text.pop();
    for place in &of.schema.slow_keywords {
        let _ = write!(text, "\n{place} is checked by a second pass over every record");
    }
    text
}

/// Which records are of a type and where their rows go.
fn message_type(of: &TypeConfig) -> String {
    let mut text = format!("{}: ", of.name);
    let topic = of.when.topic.iter().map(|topic| format!("topic {topic}"));
    let member = of.when.member.iter().map(|(name, value)| format!("{name} = {value:?}"));
    let when: Vec<String> = topic.chain(member).collect();
    text += &if when.is_empty() { "all other records".to_string() } else { when.join(", ") };
    if let Some(rows) = &of.rows {
        let _ = write!(text, "; rows go to {}", rows.table);
    }
    if let Some(event_time) = &of.event_time {
        let _ = write!(text, "; event time {event_time}");
    }
    format!("{text}\n{}", columns(of))
}

/// What valid rows are held to beyond the schema.
fn expectations(config: &Config) -> String {
    let line = |e: &ExpectationConfig| {
        let of = config.types.get(e.of).map(|of| of.name.as_str()).filter(|name| !name.is_empty());
        let of = of.map_or_else(String::new, |name| format!(" of {name}"));
        format!("{}{of}: {} ({})", e.name, e.sql, e.on_fail.name())
    };
    config.quality.expectations.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Iceberg's names for the types that schemas have.
fn type_name(data_type: &arrow::datatypes::DataType) -> String {
    use arrow::datatypes::DataType;
    match data_type {
        DataType::Utf8 => "string".into(),
        DataType::Int32 => "int".into(),
        DataType::Int64 => "long".into(),
        DataType::Float64 => "double".into(),
        DataType::Boolean => "boolean".into(),
        DataType::Timestamp(_, Some(_)) => "timestamptz".into(),
        DataType::Timestamp(_, None) => "timestamp".into(),
        DataType::Float32 => "float".into(),
        DataType::Date32 => "date".into(),
        DataType::Time64(_) => "time".into(),
        DataType::Binary => "binary".into(),
        DataType::Decimal128(precision, scale) => format!("decimal({precision}, {scale})"),
        DataType::List(element) => format!("list<{}>", type_name(element.data_type())),
        DataType::Struct(fields) => {
            let field = |f: &arrow::datatypes::FieldRef| format!("{}: {}", f.name(), type_name(f.data_type()));
            format!("struct<{}>", fields.iter().map(field).collect::<Vec<_>>().join(", "))
        }
        DataType::Map(entries, _) => match entries.data_type() {
            DataType::Struct(fields) if fields.len() == 2 => {
                format!("map<{}, {}>", type_name(fields[0].data_type()), type_name(fields[1].data_type()))
            }
            other => other.to_string(),
        },
        other => other.to_string(),
    }
}

async fn broker(config: &Config) -> Finding {
    let config = config.clone();
    blocking(move || {
        let (_, available) = open_source(&config)?;
        let mut topics: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
        for (tp, range) in &available.partitions {
            let (partitions, records) = topics.entry(&tp.topic).or_default();
            *partitions += 1;
            *records += range.len();
        }
        let mut lines = config.source.bootstrap_servers.clone();
        for (topic, (partitions, records)) in topics {
            let _ = write!(lines, "\ntopic {topic}: {partitions} partitions, {records} offsets");
        }
        Ok(lines)
    })
    .await
}

fn open_source(config: &Config) -> Result<(KafkaSource, Available), String> {
    let servers = &config.source.bootstrap_servers;
    let hint = |e: source::Error| {
        format!(
            "{servers}: {e}\ncheck source.bootstrap_servers, source.topics and the security settings in source.kafka"
        )
    };
    let chunks = ChunkSettings::with_buffer(config.execution.buffer_bytes);
    let mut source = KafkaSource::new(&config.source, QueryNames::of(&config.name), chunks).map_err(hint)?;
    let available = source.available().map_err(hint)?;
    Ok((source, available))
}

/// The newest records of a topic.
#[derive(Default)]
struct Sample {
    records: usize,
    framed: usize,
    ids: BTreeSet<u32>,
}

/// Whether records are framed as by a schema registry's serializers, and what the registry says of their schemas.
async fn payloads(config: &Config) -> Finding {
    let registry = config.registry.as_ref().map(Registry::new).transpose()?;
    let sampled = config.clone();
    let samples = blocking(move || sample(&sampled)).await?;
    let mut lines = Vec::new();
    let mut refused = false;
    for (topic, Sample { records, framed, ids }) in &samples {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        let framed = match framed {
            0 => "none with a schema id in front".to_string(),
            _ => format!("{framed} with a schema id in front: {}", ids.join(", ")),
        };
        lines.push(format!("topic {topic}: of the newest {records} records {framed}"));
        refused |= registry.is_none() && !ids.is_empty();
    }
    if refused {
        lines
            .push("without schema.registry these records become dead letters (schema_registry_framing); set it".into());
        return Err(lines.join("\n"));
    }
    if let (Some(registry), Some(place)) = (registry, config.registry.as_ref().map(RegistryConfig::place)) {
        registry.confirm().await.map_err(|e| e.to_string())?;
        lines.push(format!("schema registry {place} answers"));
        let ids = samples.into_values().flat_map(|sample| sample.ids).collect();
        for (id, writer) in registry.resolve(ids).await.map_err(|e| e.to_string())? {
            lines.push(match writer {
                Writer::Compiled(_) | Writer::General(_) => {
                    format!("schema {id}: its records are held to it and to schema.file")
                }
                Writer::Unchecked(problem) => {
                    format!("schema {id}: its records are held to schema.file alone: {problem}")
                }
                Writer::OtherType(found) => {
                    format!("schema {id} is {found}: its records become dead letters (unsupported_schema)")
                }
                Writer::Unknown => {
                    format!("schema {id} is unknown: its records become dead letters (unknown_schema_id)")
                }
            });
        }
    }
    if lines.is_empty() {
        lines.push("no records to look at yet".into());
    }
    Ok(lines.join("\n"))
}

/// By topic; without those that have no records.
fn sample(config: &Config) -> Result<BTreeMap<String, Sample>, String> {
    let (mut source, available) = open_source(config)?;
    let newest = |range: OffsetRange| OffsetRange { start: range.start.max(range.end - NEWEST), ..range };
    let ranges = available.partitions.into_iter().map(|(tp, range)| (tp, newest(range)));
    let ranges: Ranges = ranges.filter(|(_, range)| !range.is_empty()).collect();
    let mut samples: BTreeMap<String, Sample> = BTreeMap::new();
    for chunk in source.read(&ranges).map_err(|e| e.to_string())? {
        let chunk = chunk.map_err(|e| e.to_string())?;
        let sample = samples.entry(chunk.topic.to_string()).or_default();
        sample.records += chunk.records.len();
        let ids = (0..chunk.records.len()).filter_map(|index| schema_id(chunk.value(index)?));
        for id in ids {
            sample.framed += 1;
            sample.ids.insert(id);
        }
    }
    Ok(samples)
}

async fn dead_letter_topic(config: &Config, topic: &str) -> Finding {
    let (source, topic) = (config.source.clone(), topic.to_string());
    blocking(move || {
        let partitions = crate::sink::kafka::partitions(&source, &topic).map_err(|e| e.to_string())?;
        Ok(format!("topic {topic}: {partitions} partitions"))
    })
    .await
}

/// Reads an existing catalog; where there is none, looks whether one could be made.
async fn catalog(config: &Config, path: &Path) -> Finding {
    let path = path.to_path_buf();
    let tables: Vec<String> = config.tables().map(|t| t.table.clone()).collect();
    blocking(move || {
        let shown = path.display();
        if !path.exists() {
            let folder = nearest_folder(&path);
            return match tempfile_in(&folder) {
                Ok(()) => Ok(format!("{shown}: not there yet; it and {} tables will be created", tables.len())),
                Err(e) => Err(format!("{shown}: cannot be created in {}: {e}; make it writable", folder.display())),
            };
        }
        let existing = existing_tables(&path).map_err(|e| {
            format!("{shown}: cannot be read as an SQLite catalog: {e}; set catalog.path to another file or restore it")
        })?;
        let (there, missing): (Vec<_>, Vec<_>) = tables.into_iter().partition(|t| existing.contains(t));
        let list = |tables: Vec<String>| if tables.is_empty() { "none".into() } else { tables.join(", ") };
        Ok(format!("{shown}: tables there: {}; to be created: {}", list(there), list(missing)))
    })
    .await
}

/// Asks a REST catalog, and tries the tables that are there out.
async fn rest_catalog(config: &Config) -> Result<Probed, String> {
    let pipeline = Pipeline::compile(config).map_err(|problems| problems.join("\n"))?;
    let probed = iceberg::probe(&config.catalog, &pipeline.tables).await.map_err(|e| e.to_string())?;
    probed.ok_or_else(|| "there is none".to_string())
}

/// What a start would do to each table, or why it would refuse to.
async fn tables(config: &Config) -> Finding {
    let pipeline = Pipeline::compile(config).map_err(|problems| problems.join("\n"))?;
    let plans = IcebergSink::plan(&config.catalog, &pipeline.tables).await.map_err(|e| e.to_string())?;
    let refused = plans.iter().any(|plan| matches!(plan.step, TableStep::Refuse(_)));
    let lines = plans.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    if refused { Err(lines) } else { Ok(lines) }
}

fn existing_tables(path: &Path) -> rusqlite::Result<Vec<String>> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let known: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_master WHERE name = 'iceberg_tables'", [], |r| r.get(0))?;
    if known == 0 {
        return Ok(Vec::new());
    }
    let mut statement = connection
        .prepare("SELECT table_namespace || '.' || table_name FROM iceberg_tables WHERE catalog_name = ?1")?;
    statement.query_map([crate::sink::iceberg::CATALOG_NAME], |r| r.get(0))?.collect()
}

/// The folder in which a path would be created: the innermost that is there.
fn nearest_folder(path: &Path) -> PathBuf {
    let found = path.ancestors().skip(1).find(|p| p.is_dir()).map(Path::to_path_buf);
    found.unwrap_or_else(|| PathBuf::from("."))
}

fn tempfile_in(folder: &Path) -> std::io::Result<()> {
    let probe = folder.join(probe_name());
    std::fs::write(&probe, b"floe check")?;
    std::fs::remove_file(&probe)
}

fn probe_name() -> String {
    format!(".floe-check-{}", uuid::Uuid::new_v4())
}

async fn warehouse_store(warehouse: &str) -> Finding {
    let fix = "check catalog.warehouse and its permissions";
    let location = open(warehouse, fix)?;
    let new = new_folders(&location);
    let tried = put_and_delete(&location, fix).await;
    remove(&new);
    tried.map(|()| format!("{}: writable", location.url))
}

async fn checkpoint(config: &Config) -> Finding {
    let fix = "check checkpoint.location and its permissions";
    let location = open(&config.checkpoint_location, fix)?;
    let new = new_folders(&location);
    let tried = Checkpoint::probe(&location).await;
    remove(&new);
    tried.map_err(|e| match e.kind() {
        Kind::Fatal => e.to_string(),
        _ => format!("{e}; {fix}"),
    })?;
    let url = &location.url;
    match Checkpoint::inspect(location.clone()).await {
        Ok(None) => Ok(format!(
            "{url}: writable, create-if-absent holds; no checkpoint yet: starts from source.starting_offsets"
        )),
        Ok(Some(found)) if found.pipeline == config.name => {
            Ok(format!("{url}: writable, create-if-absent holds; goes on with query {}", found.query_id))
        }
        Ok(Some(found)) => Err(format!(
            "{url}: belongs to pipeline {:?}, not to {:?}; set checkpoint.location to a place of its own",
            found.pipeline, config.name
        )),
        Err(e) => Err(e.to_string()),
    }
}

fn open(location: &str, fix: &str) -> Result<Location, String> {
    crate::storage::open(location).map_err(|e| format!("{location}: {e}; {fix}"))
}

/// The folders of a local place that are not there yet, innermost first: a probe object makes them.
fn new_folders(location: &Location) -> Vec<PathBuf> {
    let path = url::Url::parse(&location.url).ok().and_then(|u| u.to_file_path().ok());
    let ancestors = path.iter().flat_map(|p| p.ancestors());
    ancestors.take_while(|folder| !folder.exists()).map(Path::to_path_buf).collect()
}

fn remove(folders: &[PathBuf]) {
    for folder in folders {
        // One that is in use by now is not empty, and stays.
        let _ = std::fs::remove_dir(folder);
    }
}

async fn put_and_delete(location: &Location, fix: &str) -> Result<(), String> {
    let failed = |e: object_store::Error| format!("{}: {}; {fix}", location.url, chain(&e));
    let probe = location.prefix.clone().join(probe_name());
    location.store.put(&probe, PutPayload::from_static(b"floe check")).await.map_err(failed)?;
    location.store.delete(&probe).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_store_is_tried_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("a/b c");
        let location = crate::storage::open(place.to_str().unwrap()).unwrap();
        Checkpoint::probe(&location).await.unwrap();
        assert!(place.is_dir());
        std::fs::remove_dir_all(folder.path().join("a")).unwrap();
        let found = warehouse_store(place.to_str().unwrap()).await.unwrap();
        assert!(found.ends_with(": writable"), "{found}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_store_that_cannot_be_written_is_a_failure_that_says_what_to_check() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let finding = warehouse_store(file.join("warehouse").to_str().unwrap()).await;
        assert!(finding.unwrap_err().contains("check catalog.warehouse"));
    }

    #[test]
    fn a_catalog_that_is_none_is_named_and_a_missing_one_is_not_created() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("catalog.db");
        assert!(existing_tables(&file).is_err());
        assert!(!file.exists());
        std::fs::write(&file, "this is no database, and it is long enough to be looked at as one").unwrap();
        assert!(existing_tables(&file).is_err());
        assert_eq!(nearest_folder(&folder.path().join("a/b/c.db")), folder.path());
        assert_eq!(nearest_folder(Path::new("c.db")), Path::new("."));
    }

    #[test]
    fn tables_of_the_catalog_are_listed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("catalog.db");
        let connection = Connection::open(&file).unwrap();
        assert_eq!(existing_tables(&file).unwrap(), Vec::<String>::new());
        connection
            .execute_batch(
                "CREATE TABLE iceberg_tables (catalog_name, table_namespace, table_name);
                 INSERT INTO iceberg_tables VALUES ('floe', 'telemetry', 'events'), ('other', 'a', 'b');",
            )
            .unwrap();
        assert_eq!(existing_tables(&file).unwrap(), ["telemetry.events"]);
    }
}
