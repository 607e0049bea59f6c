//! An S3 server for tests: moto, from PyPI, in memory; or versitygw, which checks signatures and keeps files, when
//! `FLOE_TEST_VERSITYGW` names its binary. Conditional puts have one winner in both.
#![allow(dead_code)]

use std::io::Write;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::floe::{Pipeline, free_port, http_get};
use super::reader::python;

pub const KEY: &str = "test";

/// A server with a bucket of the name `bucket`.
pub struct S3 {
    server: Child,
    pub address: String,
    _dir: Option<tempfile::TempDir>,
}

impl S3 {
    pub fn start() -> S3 {
        match std::env::var_os("FLOE_TEST_VERSITYGW") {
            Some(binary) => S3::versitygw(std::path::Path::new(&binary)),
            None => S3::moto(),
        }
    }

    pub fn moto() -> S3 {
        let port = free_port();
        let server = Command::new(python())
            .args(["-c", "import sys, threading, os\nthreading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\nfrom moto.server import main\nmain(sys.argv[1:])"])
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("moto");
        let s3 = S3 { server, address: format!("127.0.0.1:{port}"), _dir: None };
        let deadline = Instant::now() + Duration::from_secs(180);
        while http_get(&s3.address, "/moto-api/").is_none() {
            assert!(Instant::now() < deadline, "moto does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut stream = TcpStream::connect(&s3.address).unwrap();
        write!(
            stream,
            "PUT /bucket HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            s3.address
        )
        .unwrap();
        let answer = std::io::read_to_string(stream).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        s3
    }

    fn versitygw(binary: &std::path::Path) -> S3 {
        let dir = tempfile::Builder::new().prefix("floe-s3-").tempdir().expect("temp dir");
        std::fs::create_dir(dir.path().join("bucket")).expect("bucket");
        let address = format!("127.0.0.1:{}", free_port());
        let server = Command::new(binary)
            .args(["--port", &address, "posix"])
            .arg(dir.path())
            .env("ROOT_ACCESS_KEY", KEY)
            .env("ROOT_SECRET_KEY", KEY)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("versitygw");
        let s3 = S3 { server, address, _dir: Some(dir) };
        let deadline = Instant::now() + Duration::from_secs(180);
        while TcpStream::connect(&s3.address).is_err() {
            assert!(Instant::now() < deadline, "versitygw does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        s3
    }

    pub fn uri(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What PyIceberg has to know.
    pub fn properties(&self) -> Value {
        json!({
            "s3.endpoint": self.uri(), "s3.access-key-id": KEY, "s3.secret-access-key": KEY, "s3.region": "us-east-1",
            "py-io-impl": "pyiceberg.io.pyarrow.PyArrowFileIO",
        })
    }
}

/// The variables with which a pipeline finds the store at `endpoint`.
pub fn environment(pipeline: &mut Pipeline, endpoint: &str) {
    pipeline
        .env("AWS_ENDPOINT", endpoint)
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_ACCESS_KEY_ID", KEY)
        .env("AWS_SECRET_ACCESS_KEY", KEY)
        .env("AWS_REGION", "us-east-1");
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
