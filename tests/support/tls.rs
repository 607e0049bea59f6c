//! TLS in front of a plain server, with a certificate of an authority that nobody knows.
#![allow(dead_code)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::reader::python;

const PROXY: &str = r#"
import asyncio, os, ssl, sys, threading

host, port = sys.argv[1].split(":")
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()


async def pipe(source, sink):
    try:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    finally:
        sink.close()


async def serve(reader, writer):
    upstream, sink = await asyncio.open_connection(host, port)
    await asyncio.gather(pipe(reader, sink), pipe(upstream, writer), return_exceptions=True)


async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[2], sys.argv[3])
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
"#;

pub struct Tls {
    pub uri: String,
    /// The authority's certificate.
    pub ca: PathBuf,
    proxy: Child,
    _dir: tempfile::TempDir,
}

impl Tls {
    pub fn before(upstream: &str) -> Tls {
        let dir = tempfile::Builder::new().prefix("floe-tls-").tempdir().expect("temp dir");
        let (ca, ca_key) = certificate(dir.path(), "ca", &[]);
        let signed = ["-CA", &ca, "-CAkey", &ca_key, "-addext", "subjectAltName=IP:127.0.0.1"];
        let signed = [&signed[..], &["-addext", "basicConstraints=critical,CA:FALSE"]].concat();
        let (server, key) = certificate(dir.path(), "server", &signed);
        let mut proxy = Command::new(python())
            .args(["-c", PROXY, upstream, &server, &key])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python");
        let mut port = String::new();
        let said = BufReader::new(proxy.stdout.take().expect("stdout")).read_line(&mut port);
        assert!(said.is_ok_and(|bytes| bytes > 0), "the TLS proxy does not start");
        Tls { uri: format!("https://127.0.0.1:{}", port.trim()), ca: ca.into(), proxy, _dir: dir }
    }
}

/// The paths of a certificate and its key.
fn certificate(dir: &Path, name: &str, more: &[&str]) -> (String, String) {
    let path = |suffix: &str| dir.join(format!("{name}.{suffix}")).display().to_string();
    let (certificate, key) = (path("pem"), path("key"));
    let output = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"])
        .args(["-subj", &format!("/CN=floe test {name}"), "-keyout", &key, "-out", &certificate])
        .args(more)
        .output()
        .expect("openssl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (certificate, key)
}

impl Drop for Tls {
    fn drop(&mut self) {
        let _ = self.proxy.kill();
        let _ = self.proxy.wait();
    }
}
