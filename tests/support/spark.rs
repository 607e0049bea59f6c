//! Spark with Iceberg's own runtime: one `spark.py` for all tests, fetched and started by the first that asks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::catalogs::artifact;
use super::reader::{Helper, Tables, environment};

const RUNTIME: &str = "org.apache.iceberg:iceberg-spark-runtime-3.5_2.12:1.10.1";
const SQLITE: &str = "org.xerial:sqlite-jdbc:3.46.1.3";
const TIMEOUT: Duration = Duration::from_secs(300);

/// Where Spark finds the tables of one catalog; there it is called `floe` and is the default one.
pub struct Spark {
    catalog: PathBuf,
    dir: tempfile::TempDir,
}

impl Spark {
    pub fn on(tables: &Tables) -> Spark {
        let dir = tempfile::Builder::new().prefix("floe-spark-").tempdir().expect("temp dir");
        Spark { catalog: tables.catalog.clone(), dir }
    }

    pub fn sql<T: DeserializeOwned>(&self, sql: &str) -> Vec<T> {
        let rows = self.try_sql(sql).unwrap_or_else(|e| panic!("{e}"));
        serde_json::from_value(rows).expect(sql)
    }

    /// A statement that answers with nothing of interest.
    pub fn run(&self, sql: &str) {
        self.try_sql(sql).unwrap_or_else(|e| panic!("{e}"));
    }

    pub fn try_sql(&self, sql: &str) -> Result<Value, String> {
        self.ask("sql", json!({"sql": sql}))
    }

    /// All rows of a query, as a folder with a Parquet file.
    pub fn rows(&self, sql: &str) -> PathBuf {
        let to = self.dir.path().join(uuid::Uuid::new_v4().to_string());
        self.ask("rows", json!({"sql": sql, "to": to})).unwrap_or_else(|e| panic!("{e}"));
        to
    }

    /// As [`Tables::filters`], with the aggregates that Iceberg may take from manifests besides. `rows` are those of the table, from
    /// [`Spark::rows`]. Columns without values are left out.
    pub fn filters(&self, table: &str, rows: &Path, values: u32) -> std::collections::BTreeMap<String, u64> {
        let fewest = self.ask("filters", json!({"table": table, "rows": rows, "values": values}));
        serde_json::from_value(fewest.unwrap_or_else(|e| panic!("{e}"))).expect("files by column")
    }

    fn ask(&self, op: &str, mut request: Value) -> Result<Value, String> {
        static SPARK: Mutex<Option<Helper>> = Mutex::new(None);
        request["op"] = op.into();
        request["catalog"] = json!(self.catalog);
        let mut spark = SPARK.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut answer) = spark.get_or_insert_with(start).ask(&request, TIMEOUT) else {
            // A late answer would be taken for the next one's.
            *spark = None;
            return Err(format!("spark.py gave no answer within {TIMEOUT:?} to {request}"));
        };
        match answer.get("error") {
            Some(error) => Err(format!("{}\nrequest: {request}", error.as_str().unwrap_or_default())),
            None => Ok(answer["ok"].take()),
        }
    }
}

fn start() -> Helper {
    let python = environment("spark", include_str!("requirements-spark.txt"));
    let jars =
        [artifact(RUNTIME, "iceberg-spark-runtime-3.5_2.12-1.10.1.jar"), artifact(SQLITE, "sqlite-jdbc-3.46.1.3.jar")];
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("spark");
    fs::create_dir_all(&folder).expect("a folder for Spark");
    let mut command = Command::new(&python);
    command
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/spark.py"))
        .args(jars)
        .current_dir(&folder)
        .envs([("TZ", "UTC"), ("SPARK_LOCAL_IP", "127.0.0.1"), ("PYSPARK_PYTHON", python.to_str().expect("a path"))])
        .env("SPARK_LOCAL_DIRS", &folder)
        .env_remove("SPARK_HOME");
    Helper::start(command)
}
