//! A real Kafka broker for tests and benchmarks: Apache Kafka in KRaft combined mode, fetched by Maven.
//!
//! Owns: fetching the jars (once, into `target/test-kafka`), starting, stopping and disturbing a broker, and the few
//! administrative calls that tests need. A broker dies with the process that started it, however that process ends: a
//! watchdog shell reads a pipe whose other end only this process holds. (PR_SET_PDEATHSIG would fire when the *thread*
//! that spawned the broker ends, which for a test is long before the process.)
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext, ThreadedProducer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

const START_TIMEOUT: Duration = Duration::from_secs(180);

/// How the broker is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Added to `server.properties`, over the defaults of [`properties`]. In values `{port}` and `{controller_port}` stand
    /// for the ports that were chosen, for listeners of a test's own.
    pub properties: Vec<(String, String)>,
    /// `-Xmx`
    pub heap: String,
    /// Compile quickly rather than well: half the CPU and memory of a start, not for benchmarks.
    pub quick_start: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { properties: Vec::new(), heap: "384m".into(), quick_start: true }
    }
}

pub struct Broker {
    /// `127.0.0.1:port`, the same after [`Broker::restart`].
    pub bootstrap: String,
    port: u16,
    controller_port: u16,
    dir: tempfile::TempDir,
    options: Options,
    process: Mutex<Option<Process>>,
    producer: OnceLock<ThreadedProducer<Deliveries>>,
}

struct Process {
    java: Child,
    watchdog: Child,
}

/// A record to produce, where a payload alone does not say enough.
#[derive(Clone, Debug, Default)]
pub struct Rec {
    pub partition: Option<i32>,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub timestamp_ms: Option<i64>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Broker {
    /// The broker that all tests of this process share: a topic a test, and no faults.
    pub fn shared() -> &'static Broker {
        static SHARED: OnceLock<Broker> = OnceLock::new();
        // It is never killed: a machine too busy for its heartbeats must not take its partitions away.
        SHARED.get_or_init(|| Broker::start_with(&[("broker.session.timeout.ms", "30000")]))
    }

    pub fn start() -> Broker {
        Broker::start_options(Options::default())
    }

    pub fn start_with(properties: &[(&str, &str)]) -> Broker {
        let properties = properties.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Broker::start_options(Options { properties, ..Options::default() })
    }

    pub fn start_options(options: Options) -> Broker {
        let mut last = String::new();
        for _ in 0..3 {
            let (port, controller_port) = (free_port(), free_port());
            let dir = tempfile::Builder::new().prefix("floe-kafka-").tempdir().expect("temp dir");
            let broker = Broker {
                bootstrap: format!("127.0.0.1:{port}"),
                port,
                controller_port,
                dir,
                options: options.clone(),
                process: Mutex::new(None),
                producer: OnceLock::new(),
            };
            copy_dir(&installed().join("template"), &broker.dir.path().join("data"));
            match broker.launch() {
                Ok(()) => return broker,
                // Another process may have taken a port in between: other ports, then.
                Err(e) => last = e,
            }
        }
        panic!("the Kafka broker does not start:\n{last}");
    }

    /// Starts a stopped or killed broker again, on the same port and data.
    pub fn restart(&self) {
        self.kill();
        self.launch().unwrap_or_else(|e| panic!("the Kafka broker does not start again:\n{e}"));
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&self) {
        self.end("-TERM");
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&self) {
        self.end("-KILL");
    }

    /// SIGSTOP: connections stay open and nothing answers.
    pub fn pause(&self) {
        self.signal("-STOP");
    }

    pub fn resume(&self) {
        self.signal("-CONT");
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.lock().unwrap().as_ref().map(|p| p.java.id())
    }

    pub fn create_topic(&self, name: &str, partitions: i32, config: &[(&str, &str)]) {
        let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        for (key, value) in config {
            topic = topic.set(key, value);
        }
        // A topic that was just deleted may still be known for a moment; a broker that was away may not count yet.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let result = self.admin(async |admin, options| admin.create_topics([&topic], options).await);
            match result.expect("create topic").remove(0) {
                Ok(_) => break,
                Err((_, RDKafkaErrorCode::TopicAlreadyExists | RDKafkaErrorCode::InvalidReplicationFactor))
                    if Instant::now() < deadline =>
                {
                    thread::sleep(Duration::from_millis(50));
                }
                Err(e) => panic!("create topic {name}: {e:?}"),
            }
        }
        self.wait_for_partitions(name, partitions as usize);
    }

    pub fn delete_topic(&self, name: &str) {
        let result = self.admin(async |admin, options| admin.delete_topics(&[name], options).await);
        if let Err(e) = result.expect("delete topic").remove(0) {
            panic!("delete topic {name}: {e:?}");
        }
        self.wait_for_partitions(name, 0);
    }

    /// Grows the topic to `total` partitions.
    pub fn add_partitions(&self, name: &str, total: usize) {
        let new = NewPartitions::new(name, total);
        let result = self.admin(async |admin, options| admin.create_partitions([&new], options).await);
        if let Err(e) = result.expect("add partitions").remove(0) {
            panic!("add partitions to {name}: {e:?}");
        }
        self.wait_for_partitions(name, total);
    }

    /// Deletes the records below `before`; `i64::MAX` deletes all.
    pub fn delete_records(&self, topic: &str, partition: i32, before: i64) {
        let mut list = TopicPartitionList::new();
        let offset = if before == i64::MAX { Offset::End } else { Offset::Offset(before) };
        list.add_partition_offset(topic, partition, offset).unwrap();
        let result = self.admin(async |admin, options| admin.delete_records(&list, options).await);
        for element in result.expect("delete records").elements() {
            element.error().unwrap_or_else(|e| panic!("delete records of {topic}-{partition}: {e}"));
        }
    }

    /// Produces and waits until the broker has everything.
    pub fn produce<P: AsRef<[u8]>>(
        &self,
        topic: &str,
        partition: Option<i32>,
        key: Option<&[u8]>,
        payloads: impl IntoIterator<Item = P>,
    ) {
        self.produce_records(
            topic,
            payloads.into_iter().map(|payload| Rec {
                partition,
                key: key.map(<[u8]>::to_vec),
                value: Some(payload.as_ref().to_vec()),
                ..Rec::default()
            }),
        );
    }

    pub fn produce_records(&self, topic: &str, records: impl IntoIterator<Item = Rec>) {
        let producer = self.producer.get_or_init(|| {
            self.client_config()
                .set("linger.ms", "5")
                .set("acks", "all")
                .set("queue.buffering.max.messages", "1000000")
                .set("message.max.bytes", "20000000")
                .set("enable.idempotence", "true")
                .create_with_context(Deliveries::default())
                .expect("producer")
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        for r in records {
            let mut headers = OwnedHeaders::new();
            for (key, value) in &r.headers {
                headers = headers.insert(Header { key, value: value.as_ref() });
            }
            let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic);
            record.partition = r.partition;
            record.key = r.key.as_deref();
            record.payload = r.value.as_deref();
            record.timestamp = r.timestamp_ms;
            record.headers = (!r.headers.is_empty()).then_some(headers);
            while let Err((error, again)) = producer.send(record) {
                match error {
                    KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull) => {}
                    // The topic has grown or is new since the producer asked last.
                    KafkaError::MessageProduction(
                        RDKafkaErrorCode::UnknownPartition | RDKafkaErrorCode::UnknownTopic,
                    ) if Instant::now() < deadline => {
                        let _ = producer.client().fetch_metadata(Some(topic), Duration::from_secs(5));
                    }
                    error => panic!("produce to {topic}: {error}"),
                }
                thread::sleep(Duration::from_millis(5));
                record = again;
            }
        }
        producer.flush(Duration::from_secs(180)).expect("flush");
        if let Some(error) = producer.context().failed.lock().unwrap().take() {
            panic!("produce to {topic}: {error}");
        }
    }

    /// A producer that has begun no transaction yet; commit or abort through `rdkafka`'s own methods.
    pub fn transactional_producer(&self, transactional_id: &str) -> BaseProducer {
        let producer: BaseProducer =
            self.client_config().set("transactional.id", transactional_id).create().expect("producer");
        producer.init_transactions(Duration::from_secs(120)).expect("init transactions");
        producer
    }

    /// First offset and high watermark.
    pub fn watermarks(&self, topic: &str, partition: i32) -> (i64, i64) {
        let consumer: BaseConsumer = self.client_config().create().expect("client");
        consumer.fetch_watermarks(topic, partition, Duration::from_secs(60)).expect("watermarks")
    }

    /// For clients of a test's own.
    pub fn client_config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.bootstrap).set("reconnect.backoff.max.ms", "500");
        config
    }

    fn wait_for_partitions(&self, topic: &str, partitions: usize) {
        let client: BaseConsumer = self.client_config().create().expect("client");
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let metadata = client.fetch_metadata(Some(topic), Duration::from_secs(60)).expect("metadata");
            let found = metadata.topics()[0].partitions();
            if found.len() == partitions && found.iter().all(|p| p.error().is_none() && p.leader() >= 0) {
                return;
            }
            assert!(Instant::now() < deadline, "{topic} has {} partitions, not {partitions}", found.len());
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn admin<T: Send>(
        &self,
        call: impl AsyncFnOnce(&AdminClient<DefaultClientContext>, &AdminOptions) -> T + Send,
    ) -> T {
        // On a thread of its own: the caller may be inside a runtime.
        thread::scope(|scope| {
            let join = scope.spawn(|| {
                let admin = self.client_config().create().expect("admin client");
                let timeout = Some(Duration::from_secs(60));
                let options = AdminOptions::new().operation_timeout(timeout).request_timeout(timeout);
                let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
                runtime.block_on(call(&admin, &options))
            });
            join.join().expect("admin call")
        })
    }

    fn launch(&self) -> Result<(), String> {
        let properties_file = self.dir.path().join("server.properties");
        fs::write(&properties_file, self.server_properties()).expect("write server.properties");
        let log = self.dir.path().join("broker.log");
        let log_file = File::options().create(true).append(true).open(&log).expect("broker log");
        let mut command = Command::new("java");
        command.arg(format!("-Xmx{}", self.options.heap));
        if self.options.quick_start {
            command.args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]);
        }
        command
            .args(["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true"])
            .arg("-cp")
            .arg(format!("{}/libs/*", installed().display()))
            .arg("kafka.Kafka")
            .arg(&properties_file)
            .stdin(Stdio::null())
            .stdout(log_file.try_clone().expect("broker log"))
            .stderr(log_file)
            // Ctrl-C is for the test; the watchdog ends the broker.
            .process_group(0);
        let mut java = command.spawn().expect("java");
        let watchdog = Command::new("sh")
            .arg("-c")
            .arg(r#"cat >/dev/null; kill -9 "$1" 2>/dev/null; sleep 0.2; rm -rf "$2""#)
            .args(["watchdog", &java.id().to_string()])
            .arg(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("sh");

        let deadline = Instant::now() + START_TIMEOUT;
        let ready = loop {
            if let Some(status) = java.try_wait().expect("wait for java") {
                break Err(format!("it ended with {status}"));
            }
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() && self.answers() {
                break Ok(());
            }
            if Instant::now() > deadline {
                break Err(format!("it did not answer in {START_TIMEOUT:?}"));
            }
            thread::sleep(Duration::from_millis(30));
        };
        *self.process.lock().unwrap() = Some(Process { java, watchdog });
        ready.map_err(|e| {
            self.kill();
            let log = fs::read_to_string(&log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            format!("{e}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"))
        })
    }

    fn answers(&self) -> bool {
        let client: BaseConsumer = self.client_config().create().expect("client");
        client.fetch_metadata(None, Duration::from_secs(2)).is_ok_and(|m| !m.brokers().is_empty())
    }

    fn end(&self, signal: &str) {
        let Some(mut process) = self.process.lock().unwrap().take() else { return };
        // The watchdog first: once the broker is gone its pid may be anybody's. A stopped process sees no SIGTERM.
        process.watchdog.kill().expect("end the watchdog");
        process.watchdog.wait().expect("end the watchdog");
        let pid = process.java.id().to_string();
        let _ = Command::new("kill").args([signal, &pid]).stderr(Stdio::null()).status();
        let _ = Command::new("kill").args(["-CONT", &pid]).stderr(Stdio::null()).status();
        process.java.wait().expect("wait for java");
    }

    fn signal(&self, signal: &str) {
        let pid = self.pid().expect("the broker is running").to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().expect("kill").success());
    }

    fn server_properties(&self) -> String {
        let data = self.dir.path().join("data");
        let mut all = properties(self.port, self.controller_port, &data);
        let (port, controller) = (self.port.to_string(), self.controller_port.to_string());
        let ports = |v: &String| v.replace("{port}", &port).replace("{controller_port}", &controller);
        all.extend(self.options.properties.iter().map(|(k, v)| (k.clone(), ports(v))));
        // Later lines win.
        all.into_iter().map(|(k, v)| format!("{k}={v}\n")).collect()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Small, quick and without surprises: nothing is created by accident, deletions happen at once.
fn properties(port: u16, controller_port: u16, data: &Path) -> Vec<(String, String)> {
    let listeners = format!("PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}");
    let fixed = [
        ("process.roles", "broker,controller"),
        ("node.id", "1"),
        ("controller.listener.names", "CONTROLLER"),
        ("inter.broker.listener.name", "PLAINTEXT"),
        ("auto.create.topics.enable", "false"),
        ("offsets.topic.replication.factor", "1"),
        ("offsets.topic.num.partitions", "1"),
        ("transaction.state.log.replication.factor", "1"),
        ("transaction.state.log.min.isr", "1"),
        ("transaction.state.log.num.partitions", "1"),
        ("transaction.abort.timed.out.transaction.cleanup.interval.ms", "500"),
        ("share.coordinator.state.topic.replication.factor", "1"),
        ("share.coordinator.state.topic.min.isr", "1"),
        ("group.initial.rebalance.delay.ms", "0"),
        // A killed broker may register again only when its old session is over.
        ("broker.heartbeat.interval.ms", "500"),
        ("broker.session.timeout.ms", "3000"),
        // Tests set old timestamps; those that want retention set it for their topic.
        ("log.retention.ms", "-1"),
        ("log.retention.check.interval.ms", "300"),
        ("log.initial.task.delay.ms", "300"),
        ("log.segment.delete.delay.ms", "100"),
        ("log.cleaner.backoff.ms", "300"),
        ("log.cleaner.threads", "1"),
        ("log.cleaner.dedupe.buffer.size", "8388608"),
        ("message.max.bytes", "16777216"),
        ("num.network.threads", "2"),
        ("num.io.threads", "4"),
        ("num.recovery.threads.per.data.dir", "2"),
        ("background.threads", "4"),
    ];
    let mut all: Vec<(String, String)> = fixed.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    all.push(("listeners".into(), listeners));
    all.push(("advertised.listeners".into(), format!("PLAINTEXT://127.0.0.1:{port}")));
    all.push(("controller.quorum.voters".into(), format!("1@127.0.0.1:{controller_port}")));
    all.push(("log.dirs".into(), data.display().to_string()));
    all
}

/// Below the range from which the kernel takes ports for outgoing connections, so that a broker that restarts finds its
/// port free.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let n = std::process::id().wrapping_mul(37).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 20_000 + (n % 12_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// `target/test-kafka` with the jars in `libs` and a formatted, empty data directory in `template`.
fn installed() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let dir = root.join("target/test-kafka");
        fs::create_dir_all(&dir).expect("create target/test-kafka");
        let lock = File::create(dir.join("lock")).expect("lock file");
        lock.lock().expect("lock target/test-kafka");
        if !dir.join("libs").is_dir() {
            let new = fresh(&dir.join("libs.new"));
            run(
                "Maven",
                "mvn",
                Command::new("mvn")
                    .arg("-q")
                    .arg("-B")
                    .arg("-f")
                    .arg(root.join("tests/support/kafka-pom.xml"))
                    .arg("dependency:copy-dependencies")
                    .arg(format!("-DoutputDirectory={}", new.display())),
            );
            fs::rename(new, dir.join("libs")).expect("rename libs");
        }
        if !dir.join("template").is_dir() {
            let new = fresh(&dir.join("template.new"));
            let file = dir.join("template.properties");
            let text: String = properties(9092, 9093, &new).into_iter().map(|(k, v)| format!("{k}={v}\n")).collect();
            fs::write(&file, text).expect("write template.properties");
            run(
                "a Java runtime, version 17 or later,",
                "java",
                Command::new("java")
                    .arg("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
                    .arg("-cp")
                    .arg(format!("{}/libs/*", dir.display()))
                    .args(["kafka.tools.StorageTool", "format", "-t", "Zmxvw6lmbG_DqWZsb8OpZg", "-c"])
                    .arg(&file),
            );
            fs::rename(new, dir.join("template")).expect("rename template");
        }
        dir
    })
}

fn run(what: &str, program: &str, command: &mut Command) {
    match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!(
            "{command:?} failed with {}:\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(e) => panic!(
            "the tests start a real Kafka broker and need {what} as `{program}` on the PATH ({e}); on Debian and \
             Ubuntu: apt-get install openjdk-17-jre-headless maven"
        ),
    }
}

fn fresh(dir: &Path) -> PathBuf {
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir).expect("create directory");
    dir.to_path_buf()
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("create directory");
    for entry in fs::read_dir(from).expect("read directory") {
        let entry = entry.expect("read directory");
        if entry.file_type().expect("file type").is_dir() {
            copy_dir(&entry.path(), &to.join(entry.file_name()));
        } else {
            fs::copy(entry.path(), to.join(entry.file_name())).expect("copy");
        }
    }
}

#[derive(Default)]
struct Deliveries {
    failed: Mutex<Option<String>>,
}

impl rdkafka::ClientContext for Deliveries {}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, message)) = result {
            *self.failed.lock().unwrap() = Some(format!("{}-{}: {error}", message.topic(), message.partition()));
        }
    }
}
