//! The Graph simulator as a program: `cargo run --example graph-sim -- --help`.

#[path = "mod.rs"]
mod sim;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use sim::{Fixtures, Limits, PageSizes, Rule, Sim, SimConfig, SimError, Sizes};

/// Simulator of Microsoft Graph: token endpoint, Intune lists, paging, throttling, faults by rule.
///
/// Graph and the login authority are one HTTPS address. Every GUID is a tenant. The remote control is on the same
/// address, without a token: GET /admin/state, /admin/requests?last=N, /admin/collections, /admin/rules,
/// /admin/objects?tenant=T&collection=C, /admin/limits, /admin/ca; POST /admin/rules, /admin/objects/delete,
/// /admin/objects/rename, /admin/objects/add, /admin/size, /admin/latency, /admin/limits, /admin/tokens;
/// DELETE /admin/rules, /admin/state.
#[derive(Debug, Parser)]
#[command(name = "graph-sim")]
struct Args {
    /// Address to listen on; port 0 takes a free port.
    #[arg(long, default_value = "127.0.0.1:18443")]
    listen: SocketAddr,
    /// File for the certificate authority that clients must trust (PEM).
    #[arg(long, value_name = "FILE")]
    ca_out: Option<PathBuf>,
    /// Application that is issued tokens.
    #[arg(long, default_value = "11111111-2222-4333-8444-555555555555")]
    client_id: String,
    /// Client secret of the application.
    #[arg(long, default_value = "simulated-secret")]
    client_secret: String,
    /// Seed of all ids, names and random decisions; a seed makes runs reproducible.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Objects per collection; each kind of a shared collection is there at least once.
    #[arg(long, default_value_t = 12)]
    objects: u32,
    /// Objects of one collection, repeatable: beta/deviceManagement/deviceConfigurations=100000.
    #[arg(long, value_name = "COLLECTION=N", value_parser = pair)]
    size: Vec<(String, u32)>,
    /// Objects per page of a request without $top.
    #[arg(long, default_value_t = 25)]
    page_size: usize,
    /// The same for one collection, repeatable.
    #[arg(long, value_name = "COLLECTION=N", value_parser = pair)]
    collection_page_size: Vec<(String, u32)>,
    /// Delay of every response, in milliseconds.
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
    /// Lifetime of tokens, in seconds.
    #[arg(long, default_value_t = 3_599)]
    token_lifetime_s: u64,
    /// Throttle as the real service does: Intune 1,000 requests in 20 s, Conditional Access 1 per second.
    #[arg(long)]
    limits: bool,
    /// A JSON list of rules, as POST /admin/rules takes them.
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
    /// The folder of fixtures; the default is the repository's own.
    #[arg(long, value_name = "DIR")]
    fixtures: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("graph-sim: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), SimError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let sizes = args.size.clone();
    let ca_out = args.ca_out.clone();
    let sim = Sim::start(config(args)?).await?;
    for (collection, count) in sizes {
        sim.set_size(None, Some(&collection), count)?;
    }
    if let Some(file) = &ca_out {
        tokio::fs::write(file, sim.ca_pem()).await.map_err(|error| format!("{}: {error}", file.display()))?;
    }
    println!("graph-sim listens on {}", sim.base_url());
    tokio::select! {
        _ = terminate.recv() => {}
        stopped = tokio::signal::ctrl_c() => stopped?,
    }
    sim.shutdown();
    Ok(())
}

fn config(args: Args) -> Result<SimConfig, SimError> {
    let by_collection: HashMap<String, usize> =
        args.collection_page_size.into_iter().map(|(collection, size)| (collection, size as usize)).collect();
    let defaults = SimConfig::default();
    Ok(SimConfig {
        listen: args.listen,
        client_id: args.client_id,
        client_secret: args.client_secret,
        seed: args.seed,
        sizes: Sizes { default: args.objects, ..Sizes::default() },
        page_sizes: PageSizes { default: args.page_size, by_collection, ..PageSizes::default() },
        latency_ms: args.latency_ms,
        token_lifetime_s: args.token_lifetime_s,
        limits: args.limits.then(Limits::default),
        rules: args.rules.map_or(Ok(Vec::new()), read_rules)?,
        fixtures: args.fixtures.map_or(defaults.fixtures, Fixtures::Folder),
    })
}

fn read_rules(file: PathBuf) -> Result<Vec<Rule>, SimError> {
    let about = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
    let text = std::fs::read(&file).map_err(|error| about(&error))?;
    Ok(serde_json::from_slice(&text).map_err(|error| about(&error))?)
}

fn pair(text: &str) -> Result<(String, u32), String> {
    let (collection, number) = text.split_once('=').ok_or("expected COLLECTION=N")?;
    let number = number.parse().map_err(|error| format!("{number}: {error}"))?;
    Ok((collection.to_owned(), number))
}
