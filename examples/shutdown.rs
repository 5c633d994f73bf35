//! A server that shuts down when the requests in flight are done: every request holds a reference, which costs no
//! LOCKed instruction; the shutdown kills the count, after which new requests are refused; the last one to end says so.
//!
//! Run it by `cargo run --release --example shutdown`.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use pcpu::{Counter, RefCount};

const WORKERS: u64 = 4;

struct Server<F: Fn()> {
    /// One reference per request in flight.
    in_flight: RefCount<F>,
    served: Counter,
    refused: AtomicU64,
}

impl<F: Fn()> Server<F> {
    /// Serves one request; false when the server is shutting down.
    fn serve(&self, request: u64) -> bool {
        // The guard ends with the request, on whatever way it is left.
        let Some(_in_flight) = self.in_flight.try_get() else {
            self.refused.fetch_add(1, Relaxed);
            return false;
        };
        // Some requests are slow; they hold the shutdown up.
        if request.is_multiple_of(100_000) {
            thread::sleep(Duration::from_millis(20));
        }
        self.served.inc();
        true
    }
}

fn run(server: &Server<impl Fn() + Sync>, worker: u64) {
    let mut request = worker;
    while server.serve(request) {
        request += WORKERS;
    }
    println!("worker {worker}: refused, going home");
}

/// What the last reference does.
fn tell(done: Sender<Instant>) -> impl Fn() + Sync {
    move || done.send(Instant::now()).expect("main waits")
}

fn main() -> Result<(), Box<dyn Error>> {
    let (sender, done) = mpsc::channel();
    let server = Server {
        in_flight: RefCount::new(tell(sender))?,
        served: Counter::new(0)?,
        refused: AtomicU64::new(0),
    };
    thread::scope(|scope| {
        for worker in 0..WORKERS {
            let server = &server;
            scope.spawn(move || run(server, worker));
        }
        thread::sleep(Duration::from_millis(200));

        println!("shutting down after {} requests", server.served.sum());
        let begin = Instant::now();
        let kill = server.in_flight.kill()?;
        println!("killed in {:?}: {kill:?}", begin.elapsed());
        let end = done.recv()?;
        println!("last request done after {:?}", end - begin);
        // Nothing is in flight any more: what the requests used could be taken down here.
        assert!(server.in_flight.is_zero());
        Ok::<_, Box<dyn Error>>(())
    })?;
    let (served, refused) = (server.served.sum(), server.refused.load(Relaxed));
    println!("{served} requests served, {refused} refused");
    assert_eq!(refused, WORKERS);
    Ok(())
}
