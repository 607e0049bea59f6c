//! Replays real runs of Spark Structured Streaming (`tests/spark_vectors/`, or the folder in `FLOE_VECTORS`) through the
//! window functions, lanes and the state store: the same rows must come out of the same batches, at the same watermarks.
//! Every vector runs twice, with the state kept in memory and with the state recovered from deltas before every batch.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, TimeUnit, TimestampMicrosecondType};
use arrow::record_batch::RecordBatch;
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime};
use serde_json::{Map, Value};

use super::tests::config;
use super::{Delta, Lane, StateStore, WindowQuery};
use crate::config::TransformConfig;
use crate::transform::Transform;
use crate::window::{INITIAL_WATERMARK_MS, advance, closed, runs_without_data};

/// What no part of the windows decides: how Spark's JSON reader mends what Floe refuses.
const PARSING: [&str; 7] = [
    "append__malformed_messages_paced",
    "append__malformed_messages_tight",
    "append__timestamp_renderings",
    "append__timezone_day",
    "append__timezone_dst",
    "append__type_mismatches_become_null",
    "append__unknown_nested_duplicate_fields",
];

#[test]
fn spark_vectors() {
    let folder = std::env::var_os("FLOE_VECTORS").map(PathBuf::from);
    let folder =
        folder.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests").join("spark_vectors"));
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    let mut counts: BTreeMap<&str, [usize; 3]> = BTreeMap::new();
    let mut failures = Vec::new();
    for path in paths {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let kind = match name.split("__").next().unwrap() {
            "append" => "append",
            "restart" => "restart",
            _ => continue,
        };
        let count = counts.entry(kind).or_default();
        count[0] += 1;
        let vector: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        if let Some(reason) = unsupported(&name, &vector) {
            println!("skipped {name}: {reason}");
            continue;
        }
        count[1] += 1;
        match replay(&vector, false).and_then(|()| replay(&vector, true)) {
            Ok(()) => count[2] += 1,
            Err(e) => failures.push(format!("{name}: {e}")),
        }
    }
    for (kind, [all, run, passed]) in &counts {
        println!("{kind}: {passed} of {run} passed ({} skipped)", all - run);
    }
    assert!(counts.values().any(|c| c[1] > 0), "no vectors in {}", folder.display());
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

fn unsupported(name: &str, vector: &Value) -> Option<&'static str> {
    let spec = &vector["spec"];
    let overflow = vector["expected"]["error"] == "ARITHMETIC_OVERFLOW";
    if spec["output_mode"] != "append" {
        return Some("output mode update");
    }
    if !spec["slide_us"].is_null() || spec["start_offset_us"] != 0 {
        return Some("sliding windows and window offsets");
    }
    if !list(&spec["group_by"]).contains(&Value::from("window")) {
        return Some("grouped without a window");
    }
    if list(&spec["schema"]).iter().any(|c| text(&c["type"]).starts_with("decimal")) {
        return Some("decimal columns");
    }
    if list(&spec["filters"]).iter().any(|f| f["after_watermark"] == true && f["col"] == spec["time_col"]) {
        return Some("a filter on the event time behind the watermark");
    }
    if spec["ansi"] == false && name.contains("overflow") {
        return Some("integer sums that wrap");
    }
    if PARSING.iter().any(|p| name.starts_with(p)) {
        return Some("repairs of Spark's JSON reader");
    }
    if name.starts_with("restart") && (overflow || vector["expected"]["batches_equal_unbroken"] != true) {
        return Some("a result that depends on where Spark was stopped");
    }
    None
}

struct Pipeline {
    transform: Transform,
    queries: Arc<[WindowQuery]>,
    schema: Arc<Schema>,
    event_time: usize,
    delay_ms: i64,
    no_data_batches: bool,
}

/// What the checkpoint would hold.
#[derive(Default)]
struct Durable {
    deltas: Vec<Delta>,
    committed: u64,
    evict_ms: i64,
    next_ms: i64,
}

struct Ran {
    input: Vec<u64>,
    late_ms: i64,
    evict_ms: i64,
    next_ms: i64,
    late_rows: u64,
    emitted: Vec<String>,
}

fn replay(vector: &Value, recover_always: bool) -> Result<(), String> {
    let pipeline = Pipeline::new(&vector["spec"])?;
    let inputs = list(&vector["batches"]);
    let mut store = StateStore::new(pipeline.queries.clone());
    let mut durable = Durable { evict_ms: INITIAL_WATERMARK_MS, ..Durable::default() };
    let mut waiting: VecDeque<u64> = VecDeque::new();
    // A batch that was logged and not committed: it runs again with the same input and watermarks.
    let mut logged: Option<(Vec<u64>, i64, i64)> = None;
    let mut executed_any = false;
    let mut ran: Vec<Ran> = Vec::new();
    let mut alive = true;
    for step in list(&vector["steps"]) {
        match text(&step["op"]) {
            "add" => waiting.extend(list(&step["batches"]).iter().map(|b| b.as_u64().unwrap())),
            "restart" => {
                store = pipeline.recover(&durable);
                executed_any = false;
                alive = true;
            }
            "drain" if alive => loop {
                let (input, late_ms, evict_ms) = if let Some(again) = logged.take() {
                    again
                } else if let Some(next) = waiting.pop_front() {
                    (vec![next], durable.evict_ms, durable.next_ms)
                } else if pipeline.no_data_batches
                    && executed_any
                    && runs_without_data(durable.next_ms, durable.evict_ms)
                {
                    (vec![], durable.evict_ms, durable.next_ms)
                } else {
                    break;
                };
                let crash = match step["crash"]["batch_id"].as_u64() {
                    Some(batch) if batch == durable.committed => text(&step["crash"]["point"]),
                    _ => "",
                };
                if crash == "before_sink" || crash == "after_sink" {
                    logged = Some((input, late_ms, evict_ms));
                    alive = false;
                    break;
                }
                if recover_always {
                    store = pipeline.recover(&durable);
                }
                let result = pipeline.execute(&mut store, &mut durable, inputs, input, late_ms, evict_ms)?;
                ran.push(result);
                executed_any = true;
                if crash == "after_commit" {
                    alive = false;
                    break;
                }
            },
            _ => {}
        }
    }
    compare(vector, &pipeline, &ran, &durable)
}

fn compare(vector: &Value, pipeline: &Pipeline, ran: &[Ran], durable: &Durable) -> Result<(), String> {
    let expected = &vector["expected"];
    let committed: Vec<&Value> = list(&expected["batches"]).iter().filter(|b| b["outcome"] == "committed").collect();
    for (i, batch) in committed.iter().enumerate() {
        let Some(got) = ran.get(i) else { return Err(format!("batch {i} did not run")) };
        let input: Vec<u64> = list(&batch["input"]).iter().map(|b| b.as_u64().unwrap()).collect();
        let same = |what: &str, got: &dyn std::fmt::Debug, expected: &dyn std::fmt::Debug| match format!("{got:?}")
            == format!("{expected:?}")
        {
            true => Ok(()),
            false => Err(format!("batch {i}: {what}: got {got:#?}, expected {expected:#?}")),
        };
        same("input", &got.input, &input)?;
        same("late watermark", &got.late_ms, &batch["late_watermark_ms"].as_i64().unwrap())?;
        same("watermark", &got.evict_ms, &batch["watermark_ms_before"].as_i64().unwrap())?;
        same("next watermark", &got.next_ms, &batch["watermark_ms_after"].as_i64().unwrap())?;
        same("any late rows", &(got.late_rows > 0), &(batch["dropped_late"].as_u64().unwrap() > 0))?;
        same("emitted", &got.emitted, &pipeline.expected_rows(&batch["emitted"]))?;
    }
    if expected["error"].is_null() {
        if ran.len() != committed.len() {
            return Err(format!("{} batches ran, expected {}", ran.len(), committed.len()));
        }
        let mut rows: Vec<String> = ran.iter().flat_map(|r| r.emitted.clone()).collect();
        rows.sort();
        if rows != pipeline.expected_rows(&expected["final_rows"]) {
            return Err("final rows differ".to_string());
        }
        if Some(durable.next_ms) != expected["final_watermark_ms"].as_i64() {
            return Err(format!("final watermark {}, expected {}", durable.next_ms, expected["final_watermark_ms"]));
        }
    }
    Ok(())
}

impl Pipeline {
    fn new(spec: &Value) -> Result<Pipeline, String> {
        let fields: Vec<Field> = list(&spec["schema"])
            .iter()
            .map(|column| {
                let data_type = match text(&column["type"]) {
                    "string" => DataType::Utf8,
                    "double" => DataType::Float64,
                    "bigint" => DataType::Int64,
                    "timestamp" => DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())),
                    other => panic!("column type {other}"),
                };
                Field::new(text(&column["name"]), data_type, true)
            })
            .collect();
        let schema = Arc::new(Schema::new(fields));
        let filters: Vec<String> = list(&spec["filters"]).iter().map(filter_sql).collect();
        let filter = (!filters.is_empty()).then(|| filters.join(" AND "));
        let transform =
            Transform::compile(&TransformConfig { filter, columns: Vec::new() }, &schema).map_err(|e| e.join("\n"))?;
        let group_by: Vec<&str> = list(&spec["group_by"]).iter().map(text).filter(|k| *k != "window").collect();
        let aggregates: Vec<(String, String)> = list(&spec["aggregates"])
            .iter()
            .map(|a| (text(&a["as"]).to_string(), format!("{}({})", text(&a["fn"]), text(&a["col"]))))
            .collect();
        let aggregates: Vec<(&str, &str)> = aggregates.iter().map(|(n, e)| (n.as_str(), e.as_str())).collect();
        let window = config(spec["window_us"].as_u64().unwrap(), &group_by, &aggregates);
        let time_col = text(&spec["time_col"]);
        let query = WindowQuery::compile(&window, &schema, time_col).map_err(|e| e.join("\n"))?;
        Ok(Pipeline {
            transform,
            queries: vec![query].into(),
            event_time: schema.index_of(time_col).unwrap(),
            schema,
            delay_ms: spec["watermark_delay_ms"].as_i64().unwrap(),
            no_data_batches: spec["no_data_batches"] == true,
        })
    }

    fn recover(&self, durable: &Durable) -> StateStore {
        let mut store = StateStore::new(self.queries.clone());
        for delta in &durable.deltas {
            store.apply(&delta.bytes, durable.evict_ms).unwrap();
        }
        store
    }

    fn execute(
        &self,
        store: &mut StateStore,
        durable: &mut Durable,
        inputs: &[Value],
        input: Vec<u64>,
        late_ms: i64,
        evict_ms: i64,
    ) -> Result<Ran, String> {
        let mut lane = Lane::new(self.queries.clone(), (0..self.queries.len()).collect(), self.event_time, late_ms);
        for batch in &input {
            let decoded = self.decode(list(&inputs[*batch as usize]));
            let kept = self.transform.apply(&decoded).map_err(|e| e.to_string())?;
            assert!(kept.failed.is_empty());
            lane.update(&kept.batch).map_err(|e| e.to_string())?;
        }
        let next_ms = advance(evict_ms, lane.max_event_time_us(), self.delay_ms);
        let late_rows = lane.late_rows().iter().sum();
        let delta = store.merge_lanes(vec![lane], evict_ms, 2).map_err(|e| e.to_string())?;
        let mut emitted = Vec::new();
        for window in store.close(evict_ms) {
            for batch in window.evaluate().map_err(|e| e.to_string())?.0 {
                emitted.extend((0..batch.num_rows()).map(|row| show_row(&batch, row)));
            }
        }
        emitted.sort();
        durable.deltas.retain(|d| d.max_window_end_us.is_some_and(|end| !closed(end, evict_ms)));
        durable.deltas.push(delta);
        durable.committed += 1;
        durable.evict_ms = evict_ms;
        durable.next_ms = next_ms;
        Ok(Ran { input, late_ms, evict_ms, next_ms, late_rows, emitted })
    }

    /// As leniently as Spark's `from_json`: what does not parse is a row of nulls.
    fn decode(&self, messages: &[Value]) -> RecordBatch {
        let rows: Vec<Map<String, Value>> = messages
            .iter()
            .map(|message| {
                // Spark takes these numbers bare or quoted
                let mut message = message.as_str().unwrap_or_default().to_string();
                for number in ["NaN", "Infinity", "-Infinity", "+INF", "-INF"] {
                    for space in ["", " "] {
                        message = message.replace(&format!(":{space}{number}"), &format!(":\"{number}\""));
                    }
                }
                message = message.replace(":1e999", ":\"Infinity\"");
                let first = serde_json::Deserializer::from_str(&message).into_iter::<Value>().next();
                match first {
                    Some(Ok(Value::Object(object))) => object,
                    _ => Map::new(),
                }
            })
            .collect();
        let column = |field: &Arc<Field>| -> ArrayRef {
            let values = rows.iter().map(|row| row.get(field.name()).filter(|v| !v.is_null()));
            match field.data_type() {
                DataType::Utf8 => Arc::new(StringArray::from_iter(values.map(|v| match v? {
                    Value::String(s) => Some(s.clone()),
                    other => Some(other.to_string()),
                }))),
                DataType::Float64 => Arc::new(Float64Array::from_iter(values.map(|v| double(v?)))),
                DataType::Int64 => Arc::new(Int64Array::from_iter(values.map(|v| v?.as_i64()))),
                _ => Arc::new(
                    TimestampMicrosecondArray::from_iter(values.map(|v| timestamp(v?))).with_timezone("+00:00"),
                ),
            }
        };
        let columns = self.schema.fields().iter().map(column).collect();
        RecordBatch::try_new(self.schema.clone(), columns).unwrap()
    }

    fn expected_rows(&self, rows: &Value) -> Vec<String> {
        let schema = self.queries[0].output_schema();
        let show = |row: &Value| {
            let cells = schema.fields().iter().map(|field| {
                let value = &row[field.name().as_str()];
                match field.data_type() {
                    _ if value.is_null() => "null".to_string(),
                    DataType::Float64 => format!("{:?}", double(value).unwrap()),
                    DataType::Utf8 => format!("{:?}", text(value)),
                    _ => value.as_i64().unwrap().to_string(),
                }
            });
            cells.collect::<Vec<_>>().join(" ")
        };
        let mut rows: Vec<String> = list(rows).iter().map(show).collect();
        rows.sort();
        rows
    }
}

fn show_row(batch: &RecordBatch, row: usize) -> String {
    let show = |column: &ArrayRef| match column.data_type() {
        _ if column.is_null(row) => "null".to_string(),
        DataType::Float64 => format!("{:?}", column.as_primitive::<Float64Type>().value(row)),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).to_string(),
        DataType::Utf8 => format!("{:?}", column.as_string::<i32>().value(row)),
        _ => column.as_primitive::<TimestampMicrosecondType>().value(row).to_string(),
    };
    batch.columns().iter().map(show).collect::<Vec<_>>().join(" ")
}

fn filter_sql(filter: &Value) -> String {
    let col = text(&filter["col"]);
    match text(&filter["kind"]) {
        "not_null" => format!("{col} IS NOT NULL"),
        "range" => {
            let bound = |op: &str, v: &Value| (!v.is_null()).then(|| format!("{col} {op} {v}"));
            let bounds: Vec<String> =
                [bound(">=", &filter["min"]), bound("<=", &filter["max"])].into_iter().flatten().collect();
            match text(&filter["null"]) {
                "pass" => format!("({col} IS NULL OR ({}))", bounds.join(" AND ")),
                _ => bounds.join(" AND "),
            }
        }
        other => panic!("filter {other}"),
    }
}

fn double(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) if n.to_string() == "-0" => Some(0.0),
        Value::Number(n) => n.as_f64(),
        Value::String(s) => match s.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" | "+Infinity" | "+INF" => Some(f64::INFINITY),
            "-Infinity" | "-INF" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

fn timestamp(value: &Value) -> Option<i64> {
    let text = match value {
        Value::Number(n) => return Some(n.as_i64()?.wrapping_mul(1_000_000)),
        Value::String(s) => s.trim(),
        _ => return None,
    };
    if let Ok(instant) = DateTime::parse_from_rfc3339(text) {
        return Some(instant.timestamp_micros());
    }
    let civil = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"].iter();
    let civil = civil.filter_map(|format| NaiveDateTime::parse_from_str(text, format).ok()).next();
    let civil = civil.or_else(|| Some(NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?.and_time(NaiveTime::MIN)));
    Some(civil?.and_utc().timestamp_micros())
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
