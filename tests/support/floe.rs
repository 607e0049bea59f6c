//! The real binary, run as a user runs it: a configuration file in a folder of its own, variables, signals, exit codes.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use toml::Table;

use super::reader::Tables;
use super::s3::S3;

/// Longer than anything takes on a busy machine; a test that hits it has failed.
pub const TIMEOUT: Duration = Duration::from_secs(300);

/// A pipeline's configuration and the folder with its catalog, warehouse and checkpoint.
pub struct Pipeline {
    dir: tempfile::TempDir,
    config: Table,
    env: BTreeMap<String, String>,
    pub topic: String,
    runs: Cell<u32>,
    rest: Option<PathBuf>,
    /// What readers have to know of the store.
    store: Value,
}

impl Pipeline {
    /// Rows, windows and dead letters of telemetry; drains what is there and exits.
    pub fn new(bootstrap: &str, topic: &str) -> Pipeline {
        let dir = tempfile::Builder::new().prefix("floe-it-").tempdir().expect("temp dir");
        let path = |name: &str| dir.path().join(name).display().to_string();
        let text = format!(
            r#"
            name = "telemetry"
            [source]
            bootstrap_servers = "{bootstrap}"
            topics = ["{topic}"]
            [trigger]
            available_now = true
            [schema]
            file = "{root}/schemas/telemetry.json"
            [event_time]
            column = "event_timestamp"
            watermark_delay = "2 minutes"
            policy = "global-max"
            [rows]
            table = "telemetry.events"
            partition_by = ["day(event_timestamp)"]
            [[windows]]
            table = "telemetry.device_minutes"
            size = "1 minute"
            group_by = ["device_id"]
            [windows.aggregates]
            events = "count(*)"
            battery_sum = "sum(battery_level)"
            battery_avg = "avg(battery_level)"
            battery_min = "min(battery_level)"
            battery_max = "max(battery_level)"
            duration_sum = "sum(duration_ms)"
            [dead_letters]
            table = "telemetry.dead_letters"
            [catalog]
            path = "{catalog}"
            warehouse = "{warehouse}"
            [checkpoint]
            location = "{checkpoint}"
            [http]
            listen = ""
            [retry]
            initial = "100 ms"
            max = "1 second"
            "#,
            root = env!("CARGO_MANIFEST_DIR"),
            catalog = path("catalog.db"),
            warehouse = path("warehouse"),
            checkpoint = path("checkpoint"),
        );
        let config = text.parse().expect("configuration");
        Pipeline {
            dir,
            config,
            env: BTreeMap::new(),
            topic: topic.into(),
            runs: Cell::new(0),
            rest: None,
            store: json!({}),
        }
    }

    /// Sets a key, given as a path with dots; a key that itself has dots goes through [`Pipeline::kafka`].
    pub fn set(&mut self, path: &str, value: impl Into<toml::Value>) -> &mut Self {
        let (sections, key) = path.rsplit_once('.').unwrap_or(("", path));
        let mut table = &mut self.config;
        for section in sections.split('.').filter(|s| !s.is_empty()) {
            let entry = table.entry(section).or_insert_with(|| Table::new().into());
            table = entry.as_table_mut().expect("section");
        }
        table.insert(key.into(), value.into());
        self
    }

    /// Sets a key of the first window, given as a path with dots.
    pub fn set_window(&mut self, path: &str, value: impl Into<toml::Value>) -> &mut Self {
        let windows = self.config["windows"].as_array_mut().expect("windows");
        let (sections, key) = path.rsplit_once('.').unwrap_or(("", path));
        let mut table = windows[0].as_table_mut().expect("window");
        for section in sections.split('.').filter(|s| !s.is_empty()) {
            table = table[section].as_table_mut().expect("section");
        }
        table.insert(key.into(), value.into());
        self
    }

    /// One more window, as it is written after `[[windows]]`.
    pub fn add_window(&mut self, text: &str) -> &mut Self {
        let window: Table = text.parse().expect("window");
        self.config["windows"].as_array_mut().expect("windows").push(window.into());
        self
    }

    /// One more window before all others.
    pub fn insert_window(&mut self, text: &str) -> &mut Self {
        let window: Table = text.parse().expect("window");
        self.config["windows"].as_array_mut().expect("windows").insert(0, window.into());
        self
    }

    pub fn remove_window(&mut self, table: &str) -> &mut Self {
        self.config["windows"].as_array_mut().expect("windows").retain(|w| w["table"].as_str() != Some(table));
        self
    }

    pub fn remove(&mut self, section: &str) -> &mut Self {
        self.config.remove(section);
        self
    }

    /// A librdkafka property.
    pub fn kafka(&mut self, key: &str, value: &str) -> &mut Self {
        let source = self.config["source"].as_table_mut().expect("section");
        let kafka = source.entry("kafka").or_insert_with(|| Table::new().into());
        kafka.as_table_mut().expect("section").insert(key.into(), value.into());
        self
    }

    /// A service with a trigger every `interval`, and HTTP. Its batches are cut while messages arrive, so that one partition
    /// may be far behind another: the watermark's delay is large enough that no row is late for that.
    pub fn service(&mut self, interval: &str) -> &mut Self {
        self.remove("trigger").set("trigger.interval", interval).set("event_time.watermark_delay", "20 minutes");
        self.set("http.listen", format!("127.0.0.1:{}", free_port()))
    }

    pub fn env(&mut self, name: &str, value: &str) -> &mut Self {
        self.env.insert(name.into(), value.into());
        self
    }

    pub fn without_env(&mut self, name: &str) -> &mut Self {
        self.env.remove(name);
        self
    }

    /// The watermark's delay, which the tests write in minutes.
    pub fn delay_ms(&self) -> i64 {
        let delay = self.config["event_time"]["watermark_delay"].as_str().and_then(|d| d.strip_suffix(" minutes"));
        delay.and_then(|minutes| minutes.parse::<i64>().ok()).expect("minutes") * 60_000
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn checkpoint(&self) -> PathBuf {
        self.dir().join("checkpoint")
    }

    pub fn catalog(&self) -> PathBuf {
        self.dir().join("catalog.db")
    }

    /// Through the catalog's file, or through what [`Pipeline::rest`] has named.
    pub fn tables(&self) -> Tables {
        Tables::over(self.rest.clone().unwrap_or_else(|| self.catalog()), self.store.clone())
    }

    /// A REST catalog at `uri`, maybe through a proxy; readers ask the server itself.
    pub fn rest(&mut self, uri: &str, server: &str) -> &mut Self {
        self.config.remove("catalog");
        self.rest = Some(server.into());
        self.set("catalog.type", "rest").set("catalog.uri", uri)
    }

    /// What readers have to know to ask the catalog and the store.
    pub fn readers_know(&mut self, properties: Value) -> &mut Self {
        self.store = properties;
        self
    }

    /// Checkpoint and tables on `s3`, which is reached at `endpoint`; readers ask the server itself. A REST catalog decides
    /// by itself where tables are.
    pub fn on_s3(&mut self, s3: &S3, endpoint: &str) -> &mut Self {
        super::s3::environment(self, endpoint);
        self.store = s3.properties();
        if self.rest.is_none() {
            self.set("catalog.warehouse", format!("s3://bucket/warehouse/{}", self.topic));
        }
        self.set("checkpoint.location", format!("s3://bucket/checkpoints/{}", self.topic))
    }

    pub fn config_file(&self) -> PathBuf {
        let file = self.dir().join("pipeline.toml");
        fs::write(&file, toml::to_string(&self.config).expect("configuration")).expect("pipeline.toml");
        file
    }

    pub fn http_address(&self) -> String {
        self.config["http"]["listen"].as_str().expect("http.listen").into()
    }

    /// `floe run`.
    pub fn spawn(&self) -> Floe {
        self.spawn_with(&[])
    }

    /// `floe run` with more variables.
    pub fn spawn_with(&self, env: &[(&str, &str)]) -> Floe {
        let file = self.config_file();
        let mut command = self.command();
        command.arg("run").arg(file).envs(env.iter().copied());
        Floe::start(command, self.dir(), self.next_run(), self.http_address())
    }

    /// The binary with the pipeline's variables and no others of its own.
    pub fn command(&self) -> Command {
        let mut command = floe();
        command.envs(&self.env).current_dir(self.dir());
        command
    }

    /// `floe run` to its end, which has to be exit code 0.
    pub fn run(&self) -> Ended {
        self.spawn().wait().expect_code(0)
    }

    /// `floe run` to its end with a failpoint armed: `name:action[:nth]`.
    pub fn run_failing(&self, failpoint: &str) -> Ended {
        self.spawn_with(&[("FLOE_FAILPOINT", failpoint)]).wait()
    }

    /// `floe watermark --json`, which has to succeed.
    pub fn watermark(&self) -> Value {
        let output = self.command().args(["watermark", "--json"]).arg(self.config_file()).output().expect("floe");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text).expect("one JSON object")
    }

    /// `floe plan --json`, whether a run would go on, and what is said of each change.
    pub fn plan(&self, more: &[&str]) -> Value {
        let output = self.command().args(["plan", "--json"]).args(more).arg(self.config_file()).output().expect("floe");
        let text = String::from_utf8_lossy(&output.stdout);
        let shown = || format!("{text}{}", String::from_utf8_lossy(&output.stderr));
        let plan: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {}", shown()));
        let code = if plan["goes_on"].as_bool() == Some(true) { 0 } else { 3 };
        assert_eq!(output.status.code(), Some(code), "{}", shown());
        plan
    }

    /// `floe check` to its end.
    pub fn check(&self) -> Ended {
        let file = self.config_file();
        let mut command = self.command();
        command.arg("check").arg(file);
        Floe::start(command, self.dir(), 1_000, String::new()).wait()
    }

    /// `floe maintain` to its end.
    pub fn maintain(&self, arguments: &[&str]) -> Ended {
        let file = self.config_file();
        let mut command = self.command();
        command.arg("maintain").arg(file).args(arguments);
        Floe::start(command, self.dir(), 2_000, String::new()).wait()
    }

    /// Any other command, with the pipeline's file behind its arguments, to its end.
    pub fn floe(&self, arguments: &[&str]) -> Ended {
        let mut command = self.command();
        command.args(arguments).arg(self.config_file());
        Floe::start(command, self.dir(), 3_000, String::new()).wait()
    }

    fn next_run(&self) -> u32 {
        self.runs.set(self.runs.get() + 1);
        self.runs.get()
    }
}

/// The binary, with none of the variables that it reads.
pub fn floe() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["FLOE_", "KAFKA_", "CHECKPOINT_", "AWS_"].iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// A running Floe; killed when dropped.
pub struct Floe {
    child: Child,
    log: PathBuf,
    http: String,
}

impl Floe {
    pub fn start(mut command: Command, dir: &Path, run: u32, http: String) -> Floe {
        let log = dir.join(format!("floe-{run}.log"));
        let file = File::create(&log).expect("log file");
        let stderr = file.try_clone().expect("log file");
        let child = command.stdout(file).stderr(stderr).process_group(0).spawn().expect("the floe binary");
        Floe { child, log, http }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: i32) {
        send_signal(self.pid(), signal);
    }

    pub fn terminate(&self) {
        self.signal(libc::SIGTERM);
    }

    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    pub fn wait(self) -> Ended {
        self.wait_within(TIMEOUT)
    }

    pub fn wait_within(mut self, timeout: Duration) -> Ended {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for floe") {
                return Ended { status, output: self.output() };
            }
            if Instant::now() > deadline {
                panic!("floe still runs after {timeout:?}\n{}", shown(&self.output()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Polls until `what` holds; panics with the process' output when it ends or takes too long.
    pub fn until<T>(&mut self, what: &str, mut holds: impl FnMut(&Floe) -> Option<T>) -> T {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(value) = holds(self) {
                return value;
            }
            if let Some(status) = self.child.try_wait().expect("wait for floe") {
                panic!("floe ended with {status} before {what}\n{}", shown(&self.output()));
            }
            if Instant::now() > deadline {
                panic!("{what} not within {TIMEOUT:?}\n{}", shown(&self.output()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a SIGSTOP, its own included, has taken effect.
    pub fn until_stopped(&mut self) {
        let stat = format!("/proc/{}/stat", self.pid());
        self.until("the process is stopped", |_| {
            let stat = fs::read_to_string(&stat).ok()?;
            stat.rsplit_once(')')?.1.trim_start().starts_with('T').then_some(())
        });
    }

    pub fn until_ready(&mut self) {
        self.until("/readyz answers 200", |floe| (floe.get("/readyz")?.0 == 200).then_some(()));
    }

    /// Status code and body; None while nobody listens.
    pub fn get(&self, path: &str) -> Option<(u16, String)> {
        let (code, _, body) = http_get(&self.http, path)?;
        Some((code, body))
    }

    pub fn status(&self) -> Option<Value> {
        serde_json::from_str(&self.get("/status")?.1).ok()
    }

    /// The sum of a metric's samples, and None before it is there.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let body = self.get("/metrics")?.1;
        let samples =
            body.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        samples.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).reduce(|a, b| a + b)
    }
}

impl Drop for Floe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), shown(&self.output()));
        }
    }
}

/// A Floe that has ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub output: String,
}

impl Ended {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub fn was_killed(&self) -> bool {
        self.status.signal() == Some(libc::SIGKILL)
    }

    pub fn expect_code(self, code: i32) -> Ended {
        assert_eq!(self.code(), Some(code), "{}\n{}", self.status, shown(&self.output));
        self
    }

    pub fn expect_killed(self) -> Ended {
        assert!(self.was_killed(), "the failpoint was not reached: {}\n{}", self.status, shown(&self.output));
        self
    }

    /// The message is for people: what it has to name is checked, whatever the case and wording around it.
    pub fn expect_output(self, parts: &[&str]) -> Ended {
        let lower = self.output.to_lowercase();
        for part in parts {
            assert!(lower.contains(&part.to_lowercase()), "{part:?} is not in\n{}", shown(&self.output));
        }
        self
    }
}

/// The end of a log, for messages.
pub fn shown(output: &str) -> &str {
    let mut start = output.len().saturating_sub(6_000);
    while !output.is_char_boundary(start) {
        start += 1;
    }
    &output[start..]
}

pub fn send_signal(pid: i32, signal: i32) {
    // SAFETY: sends a signal to a process that this test has started; no memory is involved.
    #[allow(unsafe_code)]
    let sent = unsafe { libc::kill(pid, signal) };
    assert_eq!(sent, 0, "kill {pid}: {}", std::io::Error::last_os_error());
}

/// Not one that the kernel gives out: between two runs of a service, or before the first, somebody else would have it.
pub fn free_port() -> u16 {
    super::broker::free_port()
}

/// Status code, head and body.
pub fn http_get(address: &str, path: &str) -> Option<(u16, String, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8(answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let code = head.split(' ').nth(1)?.parse().ok()?;
    let body = if head.to_lowercase().contains("transfer-encoding: chunked") { dechunked(body)? } else { body.into() };
    Some((code, head.to_string(), body))
}

fn dechunked(mut body: &str) -> Option<String> {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n")?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        if size == 0 {
            return Some(whole);
        }
        whole.push_str(rest.get(..size)?);
        body = rest.get(size + 2..)?;
    }
}
