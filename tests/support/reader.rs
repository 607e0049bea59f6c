//! Other people's readers: a pool of `reader.py` processes in a virtual environment that is made once.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::ipc::writer::StreamWriter;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const REQUIREMENTS: &str = include_str!("requirements.txt");
const TIMEOUT: Duration = Duration::from_secs(300);

/// The Python of the virtual environment with the readers.
pub fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| environment("python", REQUIREMENTS))
}

/// The Python of a virtual environment with these packages; the first call of a fresh clone makes it.
pub fn environment(name: &str, packages: &str) -> PathBuf {
    let version = format!("{:08x}", crc32fast::hash(packages.as_bytes()));
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{version}"));
    let python = home.join("bin/python3");
    let complete = home.join("complete");
    fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).expect("target folder");
    let lock = File::create(home.with_extension("lock")).expect("lock file");
    lock.lock().expect("lock on the virtual environment");
    if complete.exists() {
        return python;
    }
    eprintln!("installing what tests read tables with into {} (once)", home.display());
    let _ = fs::remove_dir_all(&home);
    run(
        Command::new("python3").args(["-m", "venv"]).arg(&home),
        "install python3 (3.10 or later) with its venv module",
    );
    let requirements = home.join("requirements.txt");
    fs::write(&requirements, packages).expect("requirements.txt");
    run(
        Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", "-r"])
            .arg(&requirements),
        "the packages of tests/support/requirements*.txt come from PyPI",
    );
    fs::write(complete, "").expect("marker of the virtual environment");
    python
}

fn run(command: &mut Command, hint: &str) {
    let done = command.stdin(Stdio::null()).output();
    match done {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("{command:?} failed: {hint}\n{}", String::from_utf8_lossy(&output.stderr)),
        Err(e) => panic!("{command:?} did not start ({e}): {hint}"),
    }
}

/// A script that answers each line with a line.
pub struct Helper {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl Helper {
    pub fn start(mut script: Command) -> Helper {
        let mut child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a script in Python");
        let stdin = child.stdin.take().expect("stdin");
        let stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let (send, answers) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Helper { child, stdin, answers }
    }

    pub fn ask(&mut self, request: &Value, timeout: Duration) -> Option<Value> {
        writeln!(self.stdin, "{request}").ok()?;
        self.stdin.flush().ok()?;
        let line = self.answers.recv_timeout(timeout).ok()?;
        serde_json::from_str(&line).ok()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Idle helpers; each leaves by itself when this process ends and its stdin closes.
static IDLE: Mutex<Vec<Helper>> = Mutex::new(Vec::new());

fn try_ask(request: &Value) -> Result<Value, String> {
    let idle = IDLE.lock().expect("pool of readers").pop();
    let start = || {
        let mut script = Command::new(python());
        script.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/reader.py"));
        Helper::start(script)
    };
    let mut helper = idle.unwrap_or_else(start);
    let Some(mut answer) = helper.ask(request, TIMEOUT) else {
        return Err(format!("reader.py gave no answer within {TIMEOUT:?} to {request}"));
    };
    IDLE.lock().expect("pool of readers").push(helper);
    match answer.get("error") {
        Some(error) => Err(format!("{}\nrequest: {request}", error.as_str().unwrap_or_default())),
        None => Ok(answer["ok"].take()),
    }
}

/// A catalog as PyIceberg sees it: a file, or the address of a REST catalog.
#[derive(Clone, Debug)]
pub struct Tables {
    pub catalog: PathBuf,
    /// What PyIceberg has to know besides, of a REST catalog.
    properties: Value,
}

#[derive(Debug, serde::Deserialize)]
pub struct Table {
    pub uuid: String,
    pub metadata_location: String,
    pub format_version: u8,
    pub properties: std::collections::BTreeMap<String, String>,
    pub columns: Vec<(String, String, bool)>,
    pub partition_by: Vec<String>,
    pub snapshots: Vec<Snapshot>,
    /// Rows counted by PyIceberg's own scan.
    pub rows: Option<u64>,
}

#[derive(Debug, serde::Deserialize)]
pub struct Snapshot {
    pub id: i64,
    pub summary: std::collections::BTreeMap<String, String>,
}

impl Tables {
    pub fn new(catalog: impl Into<PathBuf>) -> Tables {
        Tables::over(catalog, json!({}))
    }

    pub fn over(catalog: impl Into<PathBuf>, properties: Value) -> Tables {
        Tables { catalog: catalog.into(), properties }
    }

    /// Rows of a DuckDB query, in which `{namespace.table}` stands for a table.
    pub fn query<T: DeserializeOwned>(&self, sql: &str) -> Vec<T> {
        self.try_query(sql).unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn try_query<T: DeserializeOwned>(&self, sql: &str) -> Result<Vec<T>, String> {
        let rows = try_ask(&json!({
            "op": "query", "catalog": self.catalog, "sql": sql, "properties": self.properties,
        }))?;
        serde_json::from_value(rows.clone()).map_err(|e| format!("{e} in {rows} of {sql}"))
    }

    /// The one value of a query with one row and one column.
    pub fn value<T: DeserializeOwned>(&self, sql: &str) -> T {
        let mut rows: Vec<(T,)> = self.query(sql);
        assert_eq!(rows.len(), 1, "{sql}");
        rows.remove(0).0
    }

    pub fn table(&self, name: &str) -> Table {
        let table = try_ask(&json!({
            "op": "table", "catalog": self.catalog, "table": name, "scan": true, "properties": self.properties,
        }));
        serde_json::from_value(table.unwrap_or_else(|e| panic!("{e}"))).expect("table")
    }

    pub fn recreate(&self, name: &str) {
        try_ask(&json!({"op": "recreate", "catalog": self.catalog, "table": name, "warehouse": self.warehouse()}))
            .unwrap_or_else(|e| panic!("{e}"));
    }

    /// Writes a table with PyIceberg: for the test of the harness itself.
    pub fn write(&self, name: &str, rows: &Value) {
        let request = json!({
            "op": "write", "catalog": self.catalog, "table": name, "rows": rows, "warehouse": self.warehouse(),
        });
        try_ask(&request).unwrap_or_else(|e| panic!("{e}"));
    }

    fn of_table<T: DeserializeOwned>(&self, op: &str, table: &str, more: Value) -> T {
        let mut request = json!({"op": op, "catalog": self.catalog, "properties": self.properties, "table": table});
        if let (Value::Object(request), Value::Object(more)) = (&mut request, more) {
            request.extend(more);
        }
        let answer = try_ask(&request).unwrap_or_else(|e| panic!("{e}"));
        serde_json::from_value(answer).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Partition and size of every data file.
    pub fn data_files(&self, table: &str) -> Vec<(String, i64)> {
        self.of_table("data_files", table, json!({}))
    }

    /// Time travel, by PyIceberg.
    pub fn rows_at(&self, table: &str, snapshot: i64) -> u64 {
        self.of_table("rows_at", table, json!({"snapshot": snapshot}))
    }

    /// How many rows PyIceberg, DuckDB and Polars find: the same, to the last bit, and those of `truth` if it is given. `key`
    /// is a column that tells rows apart, or several with commas between them.
    pub fn agree(&self, table: &str, key: &str, truth: Option<&[RecordBatch]>, snapshot: Option<i64>) -> u64 {
        self.all_agree(table, key, truth, snapshot, None)
    }

    /// The same, and the rows that Spark has found, by [`Spark::rows`](super::spark::Spark::rows).
    pub fn all_agree(
        &self,
        table: &str,
        key: &str,
        truth: Option<&[RecordBatch]>,
        snapshot: Option<i64>,
        spark: Option<&Path>,
    ) -> u64 {
        let file = truth.map(|truth| self.truth(truth));
        let mut request = json!({"key": key});
        if let Some(file) = &file {
            request["truth"] = json!(file.path());
        }
        if let Some(snapshot) = snapshot {
            request["snapshot"] = json!(snapshot);
        }
        if let Some(spark) = spark {
            request["also"] = json!({"spark": spark});
        }
        self.of_table("agree", table, request)
    }

    /// Filters on every column by some of its values: DuckDB and PyIceberg have to find all rows of the truth. By column: the
    /// fewest of all the files that PyIceberg reads for a value.
    pub fn filters(&self, table: &str, key: &str, truth: &[RecordBatch], values: u32) -> BTreeMap<String, u64> {
        let file = self.truth(truth);
        let files = self.data_files(table).len();
        self.of_table("filters", table, json!({"key": key, "truth": file.path(), "values": values, "files": files}))
    }

    /// Counts and bounds of each data file's columns.
    pub fn statistics(&self, table: &str) -> Vec<BTreeMap<String, Value>> {
        self.of_table("statistics", table, json!({}))
    }

    fn truth(&self, batches: &[RecordBatch]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file for the truth");
        let mut stream = StreamWriter::try_new(file.as_file(), &batches[0].schema()).expect("the truth");
        batches.iter().for_each(|batch| stream.write(batch).expect("the truth"));
        stream.finish().expect("the truth");
        file
    }

    /// How long PyIceberg takes to plan a scan of the whole table, as the median of some, and how many files it finds.
    pub fn plan(&self, table: &str) -> (Duration, u64) {
        let (seconds, files): (f64, u64) = self.of_table("plan", table, json!({}));
        (Duration::from_secs_f64(seconds), files)
    }

    /// Every file that PyIceberg finds by way of the table's metadata.
    pub fn needed_files(&self, table: &str) -> Vec<String> {
        self.of_table("needed_files", table, json!({}))
    }

    /// Another engine deletes rows.
    pub fn delete(&self, table: &str, filter: &str) {
        self.of_table("delete", table, json!({"filter": filter}))
    }

    /// Another engine appends so many rows under the topic `neighbour`, makes the branch `audit` and the tag `kept` of that, and
    /// expires the oldest snapshot. Returns the snapshots: the new one, the expired one.
    pub fn neighbour(&self, table: &str, rows: u64) -> (i64, i64) {
        self.of_table("neighbour", table, json!({"rows": rows}))
    }

    /// Branches and tags.
    pub fn refs(&self, table: &str) -> std::collections::BTreeMap<String, i64> {
        self.of_table("refs", table, json!({}))
    }

    /// Another engine adds a column of strings.
    pub fn add_column(&self, table: &str, column: &str, required: bool) {
        let request = json!({
            "op": "add_column", "catalog": self.catalog, "table": table, "column": column, "required": required,
        });
        try_ask(&request).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Rows of a query for which DuckDB asks a REST catalog by itself; `r.namespace.table` stands for a table.
    pub fn attached<T: DeserializeOwned>(&self, sql: &str) -> Vec<T> {
        let rows = try_ask(&json!({"op": "attached", "catalog": self.catalog, "sql": sql}));
        serde_json::from_value(rows.unwrap_or_else(|e| panic!("{e}"))).expect(sql)
    }

    /// Another engine commits to the table and leaves the rows as they are.
    pub fn touch(&self, table: &str) {
        let () = self.of_table("touch", table, json!({}));
    }

    /// Another writer appends a copy of one row `times` times, each in a commit of its own, with `topic` and a number as
    /// where it came from. It tries until it has succeeded.
    pub fn append_copies(&self, table: &str, topic: &str, times: u64) {
        let request = json!({
            "op": "append_copies", "catalog": self.catalog, "table": table, "topic": topic, "times": times,
            "properties": self.properties,
        });
        try_ask(&request).unwrap_or_else(|e| panic!("{e}"));
    }

    fn warehouse(&self) -> PathBuf {
        self.catalog.with_file_name("warehouse")
    }
}
