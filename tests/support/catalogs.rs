//! Real REST catalogs for tests: the Iceberg project's own server, and Nessie, fetched by Maven.
//!
//! Owns: fetching the jars (once, into `target/test-catalogs`), starting and stopping a server. A server dies with the
//! process that started it, as the broker does. The Iceberg server keeps its tables in an SQLite file and in a local
//! warehouse; `busy_timeout` and WAL are needed, or commits at the same time end in HTTP 500.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const START_TIMEOUT: Duration = Duration::from_secs(300);
const ICEBERG: &str = "org.apache.iceberg:iceberg-open-api:1.10.1";
const NESSIE: &str = "org.projectnessie.nessie:nessie-quarkus:0.99.0:jar:runner";

/// A server and all that it keeps.
pub struct RestServer {
    /// What `catalog.uri` is to be.
    pub uri: String,
    pub address: String,
    dir: tempfile::TempDir,
    process: Process,
}

/// A Java process that ends with this one.
struct Process {
    java: Child,
    watchdog: Child,
}

impl RestServer {
    /// The Iceberg project's server, with a local warehouse.
    pub fn start() -> RestServer {
        RestServer::start_with(|dir| vec![("CATALOG_WAREHOUSE", format!("file://{}", dir.join("warehouse").display()))])
    }

    /// The same with its warehouse in a bucket; `key` is both the id and the secret.
    pub fn start_on_s3(endpoint: &str, bucket: &str, key: &str) -> RestServer {
        RestServer::start_with(|_| {
            vec![
                ("CATALOG_WAREHOUSE", format!("s3://{bucket}/rest")),
                ("CATALOG_IO__IMPL", "org.apache.iceberg.aws.s3.S3FileIO".into()),
                ("CATALOG_S3_ENDPOINT", endpoint.into()),
                ("CATALOG_S3_PATH__STYLE__ACCESS", "true".into()),
                ("CATALOG_S3_ACCESS__KEY__ID", key.into()),
                ("CATALOG_S3_SECRET__ACCESS__KEY", key.into()),
                ("CATALOG_CLIENT_REGION", "us-east-1".into()),
            ]
        })
    }

    fn start_with(settings: impl FnOnce(&Path) -> Vec<(&'static str, String)>) -> RestServer {
        let jar = artifact(ICEBERG, "iceberg-open-api-1.10.1.jar");
        let dir = tempfile::Builder::new().prefix("floe-rest-").tempdir().expect("temp dir");
        let port = free_port();
        let mut command = Command::new("java");
        command
            .args(["-Xmx192m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-jar"])
            .arg(jar)
            .env("CATALOG_REST_PORT", port.to_string())
            .envs(settings(dir.path()))
            .env(
                "CATALOG_URI",
                format!("jdbc:sqlite:{}?busy_timeout=30000&journal_mode=WAL", dir.path().join("catalog.db").display()),
            );
        let address = format!("127.0.0.1:{port}");
        let process = Process::start(command, dir.path());
        let server = RestServer { uri: format!("http://{address}"), address, dir, process };
        server.until_answers("/v1/config");
        server
    }

    /// Nessie, which needs Java 21 or later and an S3 store; `more` are its properties.
    pub fn nessie(java: &Path, s3_endpoint: &str, bucket: &str, more: &[(&str, &str)]) -> RestServer {
        let jar = artifact(NESSIE, "nessie-quarkus-0.99.0-runner.jar");
        let dir = tempfile::Builder::new().prefix("floe-nessie-").tempdir().expect("temp dir");
        let (port, management) = (free_port(), free_port());
        let s3 = "nessie.catalog.service.s3.default-options";
        let rocks = dir.path().join("rocks").display().to_string();
        let properties = [
            ("quarkus.http.host", "127.0.0.1"),
            ("quarkus.http.port", &port.to_string()),
            ("quarkus.management.host", "127.0.0.1"),
            ("quarkus.management.port", &management.to_string()),
            ("nessie.version.store.type", "ROCKSDB"),
            ("nessie.version.store.persist.rocks.database-path", &rocks),
            ("nessie.catalog.default-warehouse", "wh"),
            ("nessie.catalog.warehouses.wh.location", &format!("s3://{bucket}/nessie/")),
            (&format!("{s3}.endpoint"), s3_endpoint),
            (&format!("{s3}.path-style-access"), "true"),
            (&format!("{s3}.region"), "us-east-1"),
            (&format!("{s3}.access-key"), "urn:nessie-secret:quarkus:s3k"),
            ("s3k.name", "test"),
            ("s3k.secret", "test"),
        ];
        let mut command = Command::new(java);
        command.arg("-Xmx384m");
        command.args(properties.iter().chain(more).map(|(k, v)| format!("-D{k}={v}"))).arg("-jar").arg(jar);
        let address = format!("127.0.0.1:{port}");
        let process = Process::start(command, dir.path());
        let server = RestServer { uri: format!("http://{address}/iceberg"), address, dir, process };
        server.until_answers("/iceberg/v1/config");
        server
    }

    fn until_answers(&self, path: &str) {
        let deadline = Instant::now() + START_TIMEOUT;
        while status(&self.address, path).is_none() {
            assert!(Instant::now() < deadline, "the catalog does not start:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("server.log")).unwrap_or_default()
    }
}

/// An OAuth2 server that gives any client a signed token.
pub struct OAuth2Server {
    /// Gives tokens out at `<issuer>/token`.
    pub issuer: String,
    pub address: String,
    _dir: tempfile::TempDir,
    _process: Process,
}

impl OAuth2Server {
    /// `life` is that of its tokens: an hour by default.
    pub fn start(life: Option<Duration>) -> OAuth2Server {
        let libs = home().join("mock-oauth2-server");
        fetched(&libs, |new| {
            let mut command = Command::new("mvn");
            command.args(["-q", "-B", "-f"]).arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/oauth2-pom.xml"));
            command.arg("dependency:copy-dependencies").arg(format!("-DoutputDirectory={}", new.display()));
            command
        });
        let dir = tempfile::Builder::new().prefix("floe-oauth2-").tempdir().expect("temp dir");
        let port = free_port();
        let mut command = Command::new("java");
        command
            .args(["-Xmx128m", "-cp"])
            .arg(format!("{}/*", libs.display()))
            .arg("no.nav.security.mock.oauth2.StandaloneMockOAuth2ServerKt")
            .env("SERVER_PORT", port.to_string())
            .env("SERVER_HOSTNAME", "127.0.0.1");
        if let Some(life) = life {
            let anyone = serde_json::json!({"requestParam": "grant_type", "match": "*", "claims": {"sub": "anyone"}});
            let tokens =
                serde_json::json!({"issuerId": "default", "tokenExpiry": life.as_secs(), "requestMappings": [anyone]});
            command.env(
                "JSON_CONFIG",
                serde_json::json!({"httpServer": "NettyWrapper", "tokenCallbacks": [tokens]}).to_string(),
            );
        }
        let process = Process::start(command, dir.path());
        let (address, deadline) = (format!("127.0.0.1:{port}"), Instant::now() + START_TIMEOUT);
        while status(&address, "/isalive").is_none() {
            assert!(Instant::now() < deadline, "the OAuth2 server does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        let issuer = format!("http://{address}/default");
        OAuth2Server { issuer, address, _dir: dir, _process: process }
    }
}

impl Process {
    fn start(mut command: Command, dir: &Path) -> Process {
        let log = File::create(dir.join("server.log")).expect("server log");
        let java = command
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("server log"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("java, version 17 or later, on the PATH");
        let watchdog = Command::new("sh")
            .arg("-c")
            .arg(r#"cat >/dev/null; kill -9 "$1" 2>/dev/null; sleep 0.2; rm -rf "$2""#)
            .args(["watchdog", &java.id().to_string()])
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("sh");
        Process { java, watchdog }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The watchdog first: once the server is gone its pid may be anybody's.
        let _ = self.watchdog.kill();
        let _ = self.watchdog.wait();
        let _ = self.java.kill();
        let _ = self.java.wait();
    }
}

/// The status of any answer.
fn status(address: &str, path: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    String::from_utf8_lossy(&answer).split(' ').nth(1)?.parse().ok()
}

/// A server takes seconds to bind it: one that the kernel gives out might be somebody else's by then. Beside the brokers'.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let n = std::process::id().wrapping_mul(37).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 15_000 + (n % 5_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn home() -> PathBuf {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-catalogs");
    fs::create_dir_all(&home).expect("create target/test-catalogs");
    home
}

/// A jar with all it needs.
pub fn artifact(coordinates: &str, file: &str) -> PathBuf {
    let dir = home().join(file.trim_end_matches(".jar"));
    fetched(&dir, |new| {
        let mut command = Command::new("mvn");
        command.args(["-q", "-B", "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy"]);
        command.arg(format!("-Dartifact={coordinates}")).arg(format!("-DoutputDirectory={}", new.display()));
        command.current_dir(home());
        command
    });
    dir.join(file)
}

fn fetched(dir: &Path, fetch: impl FnOnce(&Path) -> Command) {
    // Opened anew each time: threads that share an open file share its lock.
    let lock = File::create(home().join("lock")).expect("lock file");
    lock.lock().expect("lock target/test-catalogs");
    if !dir.is_dir() {
        eprintln!("fetching {} (once)", dir.display());
        let new = dir.with_extension("new");
        let _ = fs::remove_dir_all(&new);
        let output = fetch(&new).stdin(Stdio::null()).output().expect("Maven as `mvn` on the PATH");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        fs::rename(&new, dir).expect("rename");
    }
    lock.unlock().expect("unlock target/test-catalogs");
}
