use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::broker::{Broker, Rec};
use crate::support::floe::Pipeline;
use crate::support::turn;

const MINUTE_US: i64 = 60_000_000;
const DELAY_MS: i64 = 3 * 60_000;
const DAY_MS: i64 = 24 * 3_600_000;
/// Where a run may be killed that gets there only with luck.
const RARE: [&str; 4] = ["state.spill", "state.compaction", "state.adopted", "state.recovery"];
/// The first run over a slice, two batches at least, passes this many points and more.
const FIRST_RUN: u64 = 16;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().expect("a number"))
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

#[derive(Clone, Debug)]
struct Row {
    at_us: Option<i64>,
    device: Option<String>,
    n: Option<i64>,
    quarters: Option<i64>,
}

impl Row {
    fn record(&self, partition: i32) -> Rec {
        let at = self.at_us.map(|us| jiff::Timestamp::from_microsecond(us).unwrap().to_string());
        let x = self.quarters.map(|q| q as f64 / 4.0);
        let value = json!({"at": at, "device": self.device, "n": self.n, "x": x});
        Rec { partition: Some(partition), value: Some(value.to_string().into_bytes()), ..Rec::default() }
    }
}

/// A `[[windows]]` entry as the model knows it.
struct Windows {
    table: &'static str,
    size_us: i64,
    slide_us: i64,
    by_device: bool,
    /// `filter = "n > 0"`
    positive: bool,
}

const WINDOWS: [Windows; 3] = [
    Windows { table: "m.minutes", size_us: MINUTE_US, slide_us: MINUTE_US, by_device: true, positive: false },
    Windows { table: "m.sliding", size_us: 10 * MINUTE_US, slide_us: 4 * MINUTE_US, by_device: false, positive: true },
    Windows { table: "m.sevens", size_us: 7 * MINUTE_US, slide_us: 7 * MINUTE_US, by_device: true, positive: true },
];

impl Windows {
    fn toml(&self) -> String {
        let group_by = if self.by_device { "[\"device\"]" } else { "[]" };
        let filter = if self.positive { "filter = \"n > 0\"" } else { "" };
        format!(
            "table = \"{}\"\nsize = \"{} minutes\"\nslide = \"{} minutes\"\ngroup_by = {group_by}\n{filter}\n\
             aggregates = {{ events = \"count(*)\", xs = \"count(x)\", sum_n = \"sum(n)\", min_n = \"min(n)\", \
             max_n = \"max(n)\", sum_x = \"sum(x)\" }}",
            self.table,
            self.size_us / MINUTE_US,
            self.slide_us / MINUTE_US,
        )
    }

    fn starts(&self, at_us: i64) -> impl Iterator<Item = i64> {
        let last = at_us.div_euclid(self.slide_us) * self.slide_us;
        let (size_us, slide_us) = (self.size_us, self.slide_us);
        (0..).map(move |n| last - n * slide_us).take_while(move |start| start + size_us > at_us)
    }
}

/// count(*), count(x), sum(n), min(n), max(n), sum(x) in quarters
type Aggregates = (i64, i64, Option<i64>, Option<i64>, Option<i64>, Option<i64>);
/// Window start and key.
type Group = (i64, Option<String>);

fn add(into: &mut Aggregates, row: &Row) {
    into.0 += 1;
    into.1 += i64::from(row.quarters.is_some());
    let with = |old: Option<i64>, new: Option<i64>, f: fn(i64, i64) -> i64| match (old, new) {
        (Some(old), Some(new)) => Some(f(old, new)),
        (old, new) => old.or(new),
    };
    into.2 = with(into.2, row.n, |a, b| a + b);
    into.3 = with(into.3, row.n, i64::min);
    into.4 = with(into.4, row.n, i64::max);
    into.5 = with(into.5, row.quarters, |a, b| a + b);
}

#[derive(Default)]
struct Model {
    open: [BTreeMap<Group, Aggregates>; 3],
    closed: [BTreeMap<Group, Aggregates>; 3],
    late: [u64; 3],
    max_us: Option<i64>,
}

impl Model {
    /// One batch, with the watermarks that were in force: which rows come too late is for the plan to say.
    fn batch<'a>(&mut self, rows: impl Iterator<Item = &'a Row>, late_ms: Option<i64>, evict_ms: Option<i64>) {
        let is_closed = |end_us: i64, ms: Option<i64>| ms.is_some_and(|ms| end_us <= ms * 1000);
        for row in rows {
            let Some(at_us) = row.at_us else { continue };
            self.max_us = self.max_us.max(Some(at_us));
            for (index, windows) in WINDOWS.iter().enumerate() {
                if windows.positive && row.n.is_none_or(|n| n <= 0) {
                    continue;
                }
                for start in windows.starts(at_us) {
                    if is_closed(start + windows.size_us, late_ms) {
                        self.late[index] += 1;
                        continue;
                    }
                    let key = row.device.clone().filter(|_| windows.by_device);
                    add(self.open[index].entry((start, key)).or_default(), row);
                }
            }
        }
        for (index, windows) in WINDOWS.iter().enumerate() {
            let done = self.open[index].extract_if(.., |(start, _), _| is_closed(start + windows.size_us, evict_ms));
            for (group, aggregates) in done {
                assert!(self.closed[index].insert(group, aggregates).is_none(), "the model closes a group twice");
            }
        }
    }
}

/// The log files of a checkpoint by batch; the older ones are removed in time, so look after every run.
fn collect(folder: &Path, into: &mut BTreeMap<u64, Value>) {
    let Ok(files) = fs::read_dir(folder) else { return };
    for file in files {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        let entry: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let batch = entry["batch"].as_u64().unwrap();
        // A plan is never another one; a commit is never another one.
        let before = into.insert(batch, entry.clone());
        assert!(before.is_none_or(|before| before == entry), "batch {batch} has been written again");
    }
}

fn tables(pipeline: &Pipeline, windows: &Windows) -> BTreeMap<Group, Aggregates> {
    let key = if windows.by_device { "device" } else { "null" };
    let sql = format!(
        "select epoch_us(window_start), epoch_us(window_end), {key}, events, xs, sum_n, min_n, max_n, \
         (sum_x * 4)::bigint from {{{}}}",
        windows.table
    );
    type Found = (i64, i64, Option<String>, i64, i64, Option<i64>, Option<i64>, Option<i64>, Option<i64>);
    let mut found = BTreeMap::new();
    for (start, end, key, events, xs, sum, min, max, quarters) in pipeline.tables().query::<Found>(&sql) {
        assert_eq!(end - start, windows.size_us, "{}: [{start}, {end}) of {key:?}", windows.table);
        let before = found.insert((start, key), (events, xs, sum, min, max, quarters));
        assert!(before.is_none(), "{}: a group is there twice at {start}", windows.table);
    }
    found
}

fn same(table: &str, found: &BTreeMap<Group, Aggregates>, expected: &BTreeMap<Group, Aggregates>) {
    let wrong: Vec<_> = expected.iter().filter(|(k, v)| found.get(*k) != Some(v)).collect();
    let strange: Vec<_> = found.iter().filter(|(k, _)| !expected.contains_key(*k)).collect();
    assert!(
        wrong.is_empty() && strange.is_empty(),
        "{table}: of {} groups {} are missing or wrong {:?}, {} are not expected {:?}",
        expected.len(),
        wrong.len(),
        wrong.iter().take(3).map(|(k, v)| (k, v, found.get(*k))).collect::<Vec<_>>(),
        strange.len(),
        &strange[..strange.len().min(3)],
    );
}

struct Scenario {
    random: Random,
    topic: String,
    /// Nothing is late, and so nothing depends on where batches end.
    unlimited: bool,
    policy: &'static str,
    /// By partition, in the order of offsets.
    rows: Vec<Vec<Row>>,
    /// Where event time begins.
    origin_us: i64,
}

impl Scenario {
    fn row(&mut self, progress_us: i64) -> Row {
        let random = &mut self.random;
        // Some come later than the delay allows for.
        let behind = match random.below(20) {
            0 => random.below(12 * MINUTE_US as u64),
            1..=9 => 0,
            _ => random.below(3 * MINUTE_US as u64),
        };
        let mut at_us = self.origin_us + progress_us - behind as i64;
        if random.one_in(4) {
            // The same times again, and the edges of windows.
            at_us = at_us.div_euclid(MINUTE_US) * MINUTE_US - i64::from(random.one_in(3));
        }
        let hot = random.one_in(2);
        Row {
            at_us: (!random.one_in(25)).then_some(at_us),
            device: match random.below(12) {
                0 => None,
                _ if hot => Some("hot".into()),
                1 => Some(String::new()),
                n => Some(format!("device {n}")),
            },
            n: (!random.one_in(6)).then(|| random.below(2_000_001) as i64 - 1_000_000),
            quarters: (!random.one_in(6)).then(|| random.below(4_001) as i64 - 2_000),
        }
    }

    fn produce(&mut self, broker: &Broker, count: i64, from_us: i64, to_us: i64) {
        let mut records = Vec::new();
        for n in 0..count {
            let row = self.row(from_us + (to_us - from_us) * n / count);
            let partition = self.random.below(self.rows.len() as u64) as usize;
            records.push(row.record(partition as i32));
            self.rows[partition].push(row);
        }
        broker.produce_records(&self.topic, records);
    }

    fn pipeline(&self) -> Pipeline {
        let broker = Broker::shared();
        let mut pipeline = Pipeline::new(&broker.bootstrap, &self.topic);
        let nullable = |of: &str| json!({"type": [of, "null"]});
        let schema = json!({"type": "object", "properties": {
            "at": {"type": ["string", "null"], "format": "date-time"}, "device": nullable("string"),
            "n": nullable("integer"), "x": nullable("number"),
        }});
        let file = pipeline.dir().join("model.json");
        fs::write(&file, schema.to_string()).unwrap();
        pipeline.set("schema.file", file.display().to_string()).set("event_time.column", "at");
        pipeline.set("rows.table", "m.rows").set("rows.partition_by", toml::Value::Array(Vec::new()));
        pipeline.set("dead_letters.table", "m.dead_letters");
        let delay = if self.unlimited { "100 days".to_string() } else { format!("{} minutes", DELAY_MS / 60_000) };
        pipeline.set("event_time.watermark_delay", delay).set("event_time.policy", self.policy);
        if self.policy == "partition-min" {
            pipeline.set("event_time.idle_timeout", "1 hour");
        }
        pipeline.remove_window("telemetry.device_minutes");
        for windows in &WINDOWS {
            pipeline.add_window(&windows.toml());
        }
        pipeline
    }

    fn run(mut self) {
        let broker = Broker::shared();
        broker.create_topic(&self.topic, self.rows.len() as i32, &[]);
        let mut pipeline = self.pipeline();
        let (mut plans, mut commits) = (BTreeMap::new(), BTreeMap::new());
        let mut runs = 0;
        let mut kills: BTreeMap<String, u64> = BTreeMap::new();
        let slices = 3;
        for slice in 0..=slices {
            if slice < slices {
                let span = 15 * MINUTE_US;
                self.produce(broker, 350, slice * span, (slice + 1) * span);
            } else if self.unlimited {
                // Whatever is open closes, but for the windows of these.
                let partitions = 0..self.rows.len();
                let last =
                    Row { at_us: Some(self.origin_us + 200 * DAY_MS * 1000), device: None, n: None, quarters: None };
                broker.produce_records(&self.topic, partitions.map(|p| last.record(p as i32)));
                self.rows.iter_mut().for_each(|rows| rows.push(last.clone()));
            } else {
                continue;
            }
            for attempt in 0..3 {
                let random = &mut self.random;
                pipeline.set("source.max_offsets_per_trigger", 10 + random.below(120) as i64);
                pipeline.set("execution.workers", 1 + random.below(4) as i64);
                let rare = (attempt == 1 && slice < slices && random.one_in(2)).then(|| random.pick(&RARE));
                let budget = match rare {
                    Some("state.spill") => "0 B",
                    Some("state.recovery") => "1 GiB",
                    _ => random.pick(&["0 B", "16 KiB", "1 GiB"]),
                };
                pipeline.set("state.memory_budget", budget);
                if attempt < 2 {
                    let point = match rare {
                        Some(point) => format!("{point}:kill:{}", 1 + random.below(2)),
                        None if attempt == 0 && slice < slices => format!("any:kill:{}", 1 + random.below(FIRST_RUN)),
                        None => format!("any:kill:{}", 1 + random.below(8)),
                    };
                    let ended = pipeline.run_failing(&point);
                    let at =
                        ended.output.lines().find_map(|line| line.strip_prefix("failpoint ")?.strip_suffix(": kill"));
                    match at.filter(|_| ended.was_killed()) {
                        Some(at) => *kills.entry(at.to_string()).or_default() += 1,
                        // The first run of a slice always gets there.
                        None => assert!(
                            ended.code() == Some(0) && (attempt > 0 || slice == slices),
                            "{point}: {}",
                            ended.output
                        ),
                    }
                } else {
                    pipeline.run();
                }
                runs += 1;
                collect(&pipeline.checkpoint().join("offsets"), &mut plans);
                collect(&pipeline.checkpoint().join("commits"), &mut commits);
            }
        }
        let model = self.model(&plans);
        eprintln!(
            "{}: {} partitions, {}, {runs} runs, killed at {kills:?}, {} batches, {:?} groups, {:?} late",
            self.topic,
            self.rows.len(),
            self.policy,
            plans.len(),
            model.closed.each_ref().map(BTreeMap::len),
            model.late
        );
        assert_eq!(plans.keys().collect::<BTreeSet<_>>(), commits.keys().collect::<BTreeSet<_>>());
        for (index, windows) in WINDOWS.iter().enumerate() {
            same(windows.table, &tables(&pipeline, windows), &model.closed[index]);
            let late: u64 = commits.values().filter_map(|c| c["counts"]["late"][windows.table].as_u64()).sum();
            assert_eq!(late, model.late[index], "rows that are late for {}", windows.table);
        }
        let offsets: Vec<(i32, i64)> =
            pipeline.tables().query("select _kafka_partition, _kafka_offset from {m.rows} order by all");
        let expected: Vec<(i32, i64)> =
            (0..).zip(&self.rows).flat_map(|(p, rows)| (0..rows.len() as i64).map(move |o| (p, o))).collect();
        assert_eq!(offsets, expected, "every row once");
        if self.unlimited {
            self.nothing_depends_on_batches(&model);
        }
    }

    /// What the plans make of the rows; the plans themselves have to read every offset once, with watermarks that follow
    /// from what was read before.
    fn model(&self, plans: &BTreeMap<u64, Value>) -> Model {
        let delay_ms = if self.unlimited { 100 * DAY_MS } else { DELAY_MS };
        let mut model = Model::default();
        let mut next = vec![0; self.rows.len()];
        let mut evicted = None;
        for (index, (batch, plan)) in (0..).zip(plans) {
            assert_eq!(index, *batch, "no batch is missing");
            let (late_ms, evict_ms) = (plan["watermarks"]["late_ms"].as_i64(), plan["watermarks"]["evict_ms"].as_i64());
            if index > 0 {
                assert_eq!(late_ms, evicted, "batch {batch}: late by the watermark of the batch before");
                if self.policy == "global-max" {
                    let max_ms = model.max_us.map(|us| us.div_euclid(1000) - delay_ms);
                    assert_eq!(evict_ms, evicted.max(max_ms), "batch {batch}: the watermark");
                }
            }
            assert!(evict_ms >= evicted, "batch {batch}: the watermark goes back");
            evicted = evict_ms;
            let mut read = Vec::new();
            for (partition, range) in plan["ranges"][&self.topic].as_object().unwrap() {
                let partition: usize = partition.parse().unwrap();
                let (start, end) = (range["start"].as_u64().unwrap() as usize, range["end"].as_u64().unwrap() as usize);
                assert_eq!(start, next[partition], "batch {batch} of partition {partition}");
                read.extend(&self.rows[partition][start..end]);
                next[partition] = end;
            }
            model.batch(read.into_iter(), late_ms, evict_ms);
        }
        assert_eq!(next, self.rows.iter().map(Vec::len).collect::<Vec<_>>(), "every offset is planned");
        model
    }

    fn nothing_depends_on_batches(&self, model: &Model) {
        // Under global-max the first watermark is 1970, as in Spark: what closed before that is late.
        let first_ms = (self.policy == "global-max").then_some(0);
        let mut at_once = Model::default();
        at_once.batch(self.rows.iter().flatten(), first_ms, Some((self.origin_us + 100 * DAY_MS * 1000) / 1000));
        assert_eq!(at_once.late, model.late);
        for (index, windows) in WINDOWS.iter().enumerate() {
            same(windows.table, &model.closed[index], &at_once.closed[index]);
        }
    }
}

/// Random streams, batch sizes, workers, budgets and kills: the tables are what a naive model makes of the same plans; and
/// with a delay that makes nothing late, what it makes of all rows at once.
#[test]
fn tables_equal_a_naive_model() {
    let _turn = turn();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = number("FLOE_TEST_SEED").unwrap_or(u64::from(now.subsec_nanos()));
    for scenario in 0..number("FLOE_TEST_SCENARIOS").unwrap_or(4) {
        let seed = seed + scenario;
        eprintln!("FLOE_TEST_SEED={seed} FLOE_TEST_SCENARIOS=1");
        let mut random = Random(seed);
        let partitions = 1 + random.below(4) as usize;
        // 2026, or ten minutes before 1970.
        let origin_us = if random.one_in(3) { -10 * MINUTE_US } else { 1_767_225_600_000_000 };
        Scenario {
            topic: format!("model_{seed}"),
            unlimited: random.one_in(2),
            policy: random.pick(&["global-max", "partition-min"]),
            rows: vec![Vec::new(); partitions],
            origin_us,
            random,
        }
        .run();
    }
}
