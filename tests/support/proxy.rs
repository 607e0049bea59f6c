//! A proxy for HTTP that does to chosen requests what networks and gateways do: loses them, loses their answers, answers
//! with an error after the work is done, holds them back.
//!
//! One request a connection; every answer is read to its end before it is passed on.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    /// In lower case.
    pub head: String,
    pub body: String,
    /// The body as it came.
    pub bytes: Vec<u8>,
}

impl Request {
    /// A commit to one table or to several.
    pub fn is_commit(&self) -> bool {
        self.method == "POST" && (self.path.contains("/tables/") || self.path.ends_with("/transactions/commit"))
    }
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    Pass,
    /// It never arrives, and the connection ends.
    Lose,
    /// It arrives, and its answer is lost.
    LoseAnswer,
    /// It arrives, and a gateway answers in the server's place.
    AnswerAfter(u16),
    /// It never arrives; the answer is this status with an error of that message.
    Refuse(u16, String),
    /// It arrives when [`Proxy::release`] is called; by then nobody waits for the answer.
    Hold,
    /// It arrives without this header.
    Without(&'static str),
}

type Rule = Box<dyn FnMut(&Request) -> Fault + Send>;

struct Shared {
    upstream: String,
    rule: Mutex<Rule>,
    /// What is blotted out in the answers to paths with this in them.
    hidden: Option<(String, String)>,
    /// Method, path and the status that the server gave.
    seen: Mutex<Vec<(String, String, u16)>>,
    held: Mutex<usize>,
    released: (Mutex<bool>, Condvar),
    late: Mutex<Vec<u16>>,
}

pub struct Proxy {
    pub uri: String,
    shared: Arc<Shared>,
}

impl Proxy {
    pub fn start(upstream: &str, rule: impl FnMut(&Request) -> Fault + Send + 'static) -> Proxy {
        Proxy::start_with(upstream, None, rule)
    }

    /// As [`Proxy::start`], in front of a server that does not commit several tables together.
    pub fn without_transactions(upstream: &str, rule: impl FnMut(&Request) -> Fault + Send + 'static) -> Proxy {
        Proxy::hiding(upstream, "/config", "transactions/commit", rule)
    }

    /// As [`Proxy::start`], with `text` blotted out in the answers to paths that have `path` in them.
    pub fn hiding(
        upstream: &str,
        path: &str,
        text: &str,
        rule: impl FnMut(&Request) -> Fault + Send + 'static,
    ) -> Proxy {
        Proxy::start_with(upstream, Some((path.to_string(), text.to_string())), rule)
    }

    fn start_with(
        upstream: &str,
        hidden: Option<(String, String)>,
        rule: impl FnMut(&Request) -> Fault + Send + 'static,
    ) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let uri = format!("http://{}", listener.local_addr().expect("address"));
        let shared = Arc::new(Shared {
            upstream: upstream.to_string(),
            rule: Mutex::new(Box::new(rule)),
            hidden,
            seen: Mutex::default(),
            held: Mutex::default(),
            released: Default::default(),
            late: Mutex::default(),
        });
        let serving = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = serving.clone();
                // A connection that breaks is one of the things that happen here.
                std::thread::spawn(move || serve(&shared, stream).ok());
            }
        });
        Proxy { uri, shared }
    }

    /// Method, path and status of all requests that the server has answered.
    pub fn seen(&self) -> Vec<(String, String, u16)> {
        self.shared.seen.lock().unwrap().clone()
    }

    pub fn held(&self) -> usize {
        *self.shared.held.lock().unwrap()
    }

    /// Lets the held requests go on, and returns what the server says to them.
    pub fn release(&self) -> Vec<u16> {
        let held = self.held();
        *self.shared.released.0.lock().unwrap() = true;
        self.shared.released.1.notify_all();
        for _ in 0..2_000 {
            let late = self.shared.late.lock().unwrap().clone();
            if late.len() == held {
                return late;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the held requests get no answer");
    }
}

fn serve(shared: &Shared, mut client: TcpStream) -> std::io::Result<()> {
    let Some(request) = read_request(&mut client)? else { return Ok(()) };
    let fault = (shared.rule.lock().unwrap())(&request);
    match fault {
        Fault::Lose => return client.shutdown(Shutdown::Both),
        Fault::Refuse(status, message) => {
            let body = serde_json::json!({"error": {"message": message, "type": "Refused", "code": status}});
            return answer(&mut client, status, &body.to_string());
        }
        Fault::Hold => {
            *shared.held.lock().unwrap() += 1;
            let mut released = shared.released.0.lock().unwrap();
            while !*released {
                released = shared.released.1.wait(released).unwrap();
            }
        }
        _ => {}
    }
    let dropped = if let Fault::Without(header) = &fault { format!("{header}:") } else { "connection:".to_string() };
    let mut reply = forward(shared, &request, &dropped)?;
    let status = String::from_utf8_lossy(&reply[..reply.len().min(12)]).split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or(0);
    shared.seen.lock().unwrap().push((request.method.clone(), request.path.clone(), status));
    if let Some((_, text)) = shared.hidden.as_ref().filter(|(path, _)| request.path.contains(path)) {
        reply = String::from_utf8_lossy(&reply).replace(text, &"x".repeat(text.len())).into_bytes();
    }
    match fault {
        Fault::LoseAnswer => client.shutdown(Shutdown::Both),
        Fault::AnswerAfter(status) => answer(&mut client, status, "upstream trouble"),
        Fault::Hold => {
            shared.late.lock().unwrap().push(status);
            client.shutdown(Shutdown::Both)
        }
        _ => client.write_all(&reply),
    }
}

fn read_request(client: &mut TcpStream) -> std::io::Result<Option<Request>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 << 10];
    let head_end = loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break end;
        }
        let n = client.read(&mut buffer)?;
        if n == 0 {
            return Ok(None);
        }
        bytes.extend_from_slice(&buffer[..n]);
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
    let lower = head.to_lowercase();
    let length = lower.lines().find_map(|l| l.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    let mut body = bytes.split_off(head_end + 4);
    while body.len() < length.unwrap_or(0) {
        let n = client.read(&mut buffer)?;
        if n == 0 {
            return Ok(None);
        }
        body.extend_from_slice(&buffer[..n]);
    }
    let mut first = head.split(' ');
    let method = first.next().unwrap_or_default().to_string();
    let path = first.next().unwrap_or_default().to_string();
    let headers = head.split_once("\r\n").map_or("", |(_, headers)| headers);
    let text = String::from_utf8_lossy(&body).into_owned();
    Ok(Some(Request { method, path, head: headers.to_string(), body: text, bytes: body }))
}

fn forward(shared: &Shared, request: &Request, dropped: &str) -> std::io::Result<Vec<u8>> {
    let mut upstream = TcpStream::connect(&shared.upstream)?;
    upstream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let goes = |line: &str| line.starts_with("connection:") || line.starts_with(dropped);
    let kept = request.head.lines().filter(|line| !goes(&line.to_lowercase()));
    let head = kept.collect::<Vec<_>>().join("\r\n");
    write!(upstream, "{} {} HTTP/1.1\r\n{head}\r\nConnection: close\r\n\r\n", request.method, request.path)?;
    upstream.write_all(&request.bytes)?;
    let mut reply = Vec::new();
    upstream.read_to_end(&mut reply)?;
    Ok(reply)
}

fn answer(client: &mut TcpStream, status: u16, body: &str) -> std::io::Result<()> {
    write!(client, "HTTP/1.1 {status} Fault\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}
