//! One vector: its pipeline in Floe's words, its steps, and what came of them against what Spark made of them.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{
    DataType, Decimal128Type, Field, Float64Type, Int64Type, Schema, TimeUnit, TimestampMicrosecondType,
};
use arrow::record_batch::RecordBatch;
use serde_json::Value;

use super::json::{FromJson, double, rfc3339};
use crate::config::TransformConfig;
use crate::state::tests::{close, config};
use crate::state::{Delta, Lane, StateStore, WindowQuery};
use crate::transform::Transform;
use crate::window::{INITIAL_WATERMARK_MS, Windowing, advance, closed, runs_without_data};

struct Pipeline {
    reader: FromJson,
    transform: Transform,
    queries: Arc<[WindowQuery]>,
    /// Index of the event time.
    event_time: usize,
    /// Indices of the group keys.
    keys: Vec<usize>,
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
    /// As Spark counts: groups of closed windows.
    late_groups: u64,
    emitted: Vec<String>,
}

pub fn replay(vector: &Value, recover_always: bool) -> Result<(), String> {
    let pipeline = Pipeline::new(&vector["spec"])?;
    let inputs = list(&vector["batches"]);
    let mut store = StateStore::new(pipeline.queries.clone());
    let mut durable = Durable { evict_ms: INITIAL_WATERMARK_MS, ..Durable::default() };
    let mut waiting: VecDeque<u64> = VecDeque::new();
    // A batch that was logged and not committed: it runs again with the same input and watermarks.
    let mut logged: Option<(Vec<u64>, i64, i64)> = None;
    let mut ran: Vec<Ran> = Vec::new();
    let mut alive = true;
    for step in list(&vector["steps"]) {
        match text(&step["op"]) {
            "add" => waiting.extend(list(&step["batches"]).iter().map(|b| b.as_u64().unwrap())),
            "restart" => {
                store = pipeline.recover(&durable);
                alive = true;
            }
            "drain" if alive => loop {
                let (input, late_ms, evict_ms) = if let Some(again) = logged.take() {
                    again
                } else if let Some(next) = waiting.pop_front() {
                    (vec![next], durable.evict_ms, durable.next_ms)
                } else if pipeline.no_data_batches && runs_without_data(durable.next_ms, durable.evict_ms) {
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
                ran.push(pipeline.execute(&mut store, &mut durable, inputs, input, late_ms, evict_ms)?);
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
    let mut rows: Vec<String> = ran.iter().flat_map(|r| r.emitted.clone()).collect();
    rows.sort();
    // Spark's restart forgets a batch without data that was due. Floe's does not, and comes out as if there had been no stop.
    if expected["batches_equal_unbroken"] == false {
        let unbroken = match expected["equals_unbroken"] == true {
            true => &expected["final_rows"],
            false => &expected["unbroken_final_rows"],
        };
        return same("final rows", &rows, &pipeline.expected_rows(unbroken));
    }
    let committed: Vec<&Value> = list(&expected["batches"]).iter().filter(|b| b["outcome"] == "committed").collect();
    for (i, batch) in committed.iter().enumerate() {
        let Some(got) = ran.get(i) else { return Err(format!("batch {i} did not run")) };
        let input: Vec<u64> = list(&batch["input"]).iter().map(|b| b.as_u64().unwrap()).collect();
        let at = |what: &str| format!("batch {i}: {what}");
        same(&at("input"), &got.input, &input)?;
        same(&at("late watermark"), &Some(got.late_ms), &batch["late_watermark_ms"].as_i64())?;
        same(&at("watermark"), &Some(got.evict_ms), &batch["watermark_ms_before"].as_i64())?;
        same(&at("next watermark"), &Some(got.next_ms), &batch["watermark_ms_after"].as_i64())?;
        same(&at("late groups"), &Some(got.late_groups), &batch["dropped_late"].as_u64())?;
        same(&at("emitted"), &got.emitted, &pipeline.expected_rows(&batch["emitted"]))?;
    }
    // Where Spark's query ends with an overflow, Floe's goes on.
    if expected["error"].is_null() {
        same("number of batches", &ran.len(), &committed.len())?;
        same("final rows", &rows, &pipeline.expected_rows(&expected["final_rows"]))?;
        same("final watermark", &Some(durable.next_ms), &expected["final_watermark_ms"].as_i64())?;
    }
    Ok(())
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: &T, expected: &T) -> Result<(), String> {
    match got == expected {
        true => Ok(()),
        false => Err(format!("{what}: got {got:#?}, expected {expected:#?}")),
    }
}

impl Pipeline {
    fn new(spec: &Value) -> Result<Pipeline, String> {
        let fields = list(&spec["schema"]).iter().map(|column| {
            let data_type = match text(&column["type"]) {
                "string" => DataType::Utf8,
                "double" => DataType::Float64,
                "bigint" => DataType::Int64,
                "timestamp" => DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())),
                decimal => {
                    let digits = decimal.strip_prefix("decimal(").and_then(|d| d.strip_suffix(')')?.split_once(','));
                    let (precision, scale) = digits.unwrap_or_else(|| panic!("column type {decimal}"));
                    DataType::Decimal128(precision.parse().unwrap(), scale.parse().unwrap())
                }
            };
            Field::new(text(&column["name"]), data_type, true)
        });
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        // Spark pushes a filter behind the watermark below it, unless it is about the time: that one is the window's.
        let (of_window, of_rows): (Vec<&Value>, Vec<&Value>) =
            list(&spec["filters"]).iter().partition(|f| f["after_watermark"] == true && f["col"] == spec["time_col"]);
        let all = |filters: &[&Value]| {
            let filters: Vec<String> = filters.iter().map(|filter| filter_sql(filter)).collect();
            (!filters.is_empty()).then(|| filters.join(" AND "))
        };
        let transform = TransformConfig { filter: all(&of_rows), columns: Vec::new() };
        let transform = Transform::compile(&transform, &schema).map_err(|e| e.join("\n"))?;
        let group_by: Vec<&str> = list(&spec["group_by"]).iter().map(text).filter(|k| *k != "window").collect();
        let aggregates: Vec<(String, String)> = list(&spec["aggregates"])
            .iter()
            .map(|a| (text(&a["as"]).to_string(), format!("{}({})", text(&a["fn"]), text(&a["col"]))))
            .collect();
        let aggregates: Vec<(&str, &str)> = aggregates.iter().map(|(n, e)| (n.as_str(), e.as_str())).collect();
        let micros = |key: &str| spec[key].as_u64().map(Duration::from_micros);
        let size = micros("window_us").unwrap();
        let mut window = config(size.as_micros() as u64, &group_by, &aggregates);
        let start = micros("start_offset_us").unwrap();
        window.windowing = Windowing::new(size, micros("slide_us"), start, None).map_err(|e| format!("{e:?}"))?;
        window.filter = all(&of_window);
        let time_col = text(&spec["time_col"]);
        let query = WindowQuery::compile(&window, &schema, time_col).map_err(|e| e.join("\n"))?;
        Ok(Pipeline {
            transform,
            queries: vec![query].into(),
            event_time: schema.index_of(time_col).unwrap(),
            keys: group_by.iter().map(|key| schema.index_of(key).unwrap()).collect(),
            reader: FromJson::new(schema, text(&spec["time_zone"])),
            delay_ms: spec["watermark_delay_ms"].as_i64().unwrap(),
            no_data_batches: spec["no_data_batches"] == true,
        })
    }

    fn recover(&self, durable: &Durable) -> StateStore {
        let mut store = StateStore::new(self.queries.clone());
        for delta in &durable.deltas {
            store.apply(delta, durable.evict_ms).unwrap();
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
        let mut late = BTreeSet::new();
        for batch in &input {
            let decoded = self.reader.read(list(&inputs[*batch as usize]));
            let kept = self.transform.apply(&decoded).map_err(|e| e.to_string())?;
            assert!(kept.failed.is_empty());
            lane.update(&kept.batch).map_err(|e| e.to_string())?;
            self.late_groups(&kept.batch, &lane, late_ms, &mut late)?;
        }
        let next_ms = advance(evict_ms, lane.max_event_time_us(), self.delay_ms);
        let delta = store.merge_lanes(vec![lane], evict_ms, 2).map_err(|e| e.to_string())?;
        let mut emitted = Vec::new();
        for window in close(store, evict_ms) {
            for batch in window.evaluate().map_err(|e| e.to_string())?.0 {
                emitted.extend((0..batch.num_rows()).map(|row| show_row(batch.columns(), row)));
            }
        }
        emitted.sort();
        durable.deltas.retain(|d| d.max_window_end_us.is_some_and(|end| !closed(end, evict_ms)));
        durable.deltas.push(delta);
        durable.committed += 1;
        durable.evict_ms = evict_ms;
        durable.next_ms = next_ms;
        Ok(Ran { input, late_ms, evict_ms, next_ms, late_groups: late.len() as u64, emitted })
    }

    /// The windows and keys of late rows; there are as many such rows as the lane counts.
    fn late_groups(
        &self,
        batch: &RecordBatch,
        lane: &Lane,
        late_ms: i64,
        groups: &mut BTreeSet<(i64, String)>,
    ) -> Result<(), String> {
        let keys: Vec<ArrayRef> = self.keys.iter().map(|key| batch.column(*key).clone()).collect();
        let mut rows = 0;
        for late in self.queries[0].late_rows(batch, self.event_time, late_ms).map_err(|e| e.to_string())? {
            rows += late.rows.len() as u64;
            let key = |row: u32| show_row(&keys, row as usize).replace("-0.0", "0.0");
            groups.extend(late.rows.into_iter().map(|row| (late.start_us, key(row))));
        }
        same("late rows", &rows, &lane.late_rows()[0])
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
                    DataType::Decimal128(_, _) => text(value).to_string(),
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

fn show_row(columns: &[ArrayRef], row: usize) -> String {
    let show = |column: &ArrayRef| match column.data_type() {
        _ if column.is_null(row) => "null".to_string(),
        DataType::Float64 => format!("{:?}", column.as_primitive::<Float64Type>().value(row)),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).to_string(),
        DataType::Utf8 => format!("{:?}", column.as_string::<i32>().value(row)),
        DataType::Decimal128(_, _) => column.as_primitive::<Decimal128Type>().value_as_string(row),
        _ => column.as_primitive::<TimestampMicrosecondType>().value(row).to_string(),
    };
    columns.iter().map(show).collect::<Vec<_>>().join(" ")
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
        "ts_before" => format!("{col} < '{}'", rfc3339(filter["micros"].as_i64().unwrap())),
        other => panic!("filter {other}"),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
