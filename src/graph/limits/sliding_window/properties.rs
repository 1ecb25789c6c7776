//! Property of every limit: no arrivals, restarts or number of replicas make Graph refuse a request.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;
use tokio::time::Instant;

use super::{Allowance, DocumentedLimit, REORDER_MARGIN, SlidingWindow, counted_for};

/// Lateness with which a turn may be used, and the rest of the margin for the way to Graph.
const LATE: Duration = Duration::from_millis(100);

/// One replica: what it has still to send and do, in order of time since the start.
#[derive(Debug)]
struct Replica {
    arrivals: VecDeque<Duration>,
    restarts: VecDeque<Duration>,
    sent: SlidingWindow,
    /// Earliest time of its next request.
    ready: Duration,
}

/// Replicas of one tenant and family, and the turns that they share.
struct Fleet {
    start: Instant,
    allowance: Allowance,
    next_turn: Duration,
    replicas: Vec<Replica>,
}

impl Fleet {
    /// Sends everything and returns the times at which Graph receives it. `delays` are shares of the longest delay.
    fn run(mut self, delays: &[f64]) -> Vec<Duration> {
        let (mut received, mut delays) = (Vec::new(), delays.iter().copied().cycle());
        let mut delay = move || delays.next().unwrap_or_default();
        while let Some(index) = self.next_replica() {
            let replica = &mut self.replicas[index];
            let now = replica.ready.max(replica.arrivals[0]);
            if replica.restarts.front().is_some_and(|at| *at <= now) {
                let at = replica.restarts.pop_front().unwrap();
                replica.sent = SlidingWindow::of_predecessor(self.allowance, self.start + at);
                // A wait ends with the process that waited; a turn that is taken stays taken.
                let has_turn = self.allowance.between_turns.is_some();
                replica.ready = if has_turn { replica.ready.max(at) } else { at };
                continue;
            }
            if let Some(interval) = self.allowance.between_turns {
                let turn = self.next_turn.max(now);
                self.next_turn = turn + interval;
                let used = turn + LATE.mul_f64(delay());
                replica.arrivals.pop_front();
                replica.ready = used;
                received.push(used + (REORDER_MARGIN - LATE).mul_f64(delay()));
                continue;
            }
            match replica.sent.try_send(self.allowance, self.start + now) {
                Ok(()) => {
                    replica.arrivals.pop_front();
                    replica.ready = now;
                    received.push(now + REORDER_MARGIN.mul_f64(delay()));
                }
                Err(wait) => replica.ready = now + wait,
            }
        }
        received.sort();
        received
    }

    /// Replica whose next request is due first.
    fn next_replica(&self) -> Option<usize> {
        let busy = self.replicas.iter().enumerate().filter(|(_, replica)| !replica.arrivals.is_empty());
        busy.min_by_key(|(_, replica)| replica.ready.max(replica.arrivals[0])).map(|(index, _)| index)
    }
}

/// Requests that Graph refuses: each that finds `max` others in the window before it, as the simulator counts them.
fn refused(received: &[Duration], limit: DocumentedLimit) -> usize {
    let (mut calls, mut refused) = (VecDeque::new(), 0);
    for now in received {
        while calls.front().is_some_and(|call| *now - *call >= limit.window) {
            calls.pop_front();
        }
        calls.push_back(*now);
        if calls.len() > limit.max as usize {
            refused += 1;
            calls.pop_front();
        }
    }
    refused
}

fn limits() -> impl Strategy<Value = DocumentedLimit> {
    let max = prop_oneof![4 => 1_u32..=5, 2 => 6_u32..=60, 1 => 61_u32..=400, 1 => Just(1_000), 1 => Just(2_000)];
    let window_s = prop_oneof![Just(1_u64), Just(20)];
    (max, window_s).prop_map(|(max, window_s)| DocumentedLimit { max, window: Duration::from_secs(window_s) })
}

/// Load of a replica: arrivals, each a share of the window and a number of requests, and restarts as shares of a window.
type Load = (Vec<(f64, u32)>, Vec<f64>);

/// Arrivals within two windows, mostly in crowds, and up to two restarts.
fn load() -> impl Strategy<Value = Load> {
    (prop::collection::vec((0.0..2.0, 1_u32..400), 1..5), prop::collection::vec(0.0..1.0, 0..3))
}

fn fleet(limit: DocumentedLimit, share: f64, replicas: &[Load]) -> Option<Fleet> {
    let allowance = limit.allowance(share, u32::try_from(replicas.len()).unwrap())?;
    let replicas = replicas.iter().map(|(crowds, restarts)| {
        // Enough to fill the windows of high limits, and not so much that low ones take for ever.
        let most = (limit.max * 3).max(20);
        let mut arrivals: Vec<Duration> = (crowds.iter())
            .flat_map(|(at, requests)| vec![limit.window.mul_f64(*at); (*requests).min(most) as usize])
            .collect();
        arrivals.sort();
        // A process that fails within a window of its start is not restarted before that window has passed.
        let mut at = Duration::ZERO;
        let restarts = restarts.iter().map(|share| {
            let this = at + limit.window.mul_f64(*share);
            at = this + counted_for(limit.window);
            this
        });
        let (restarts, sent) = (restarts.collect(), SlidingWindow::default());
        Replica { arrivals: arrivals.into(), restarts, sent, ready: Duration::ZERO }
    });
    Some(Fleet { start: Instant::now(), allowance, next_turn: Duration::ZERO, replicas: replicas.collect() })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn graph_never_refuses_a_request(
        limit in limits(),
        share in prop_oneof![Just(0.8), Just(1.0), 0.05..1.0],
        replicas in prop::collection::vec(load(), 1..=8),
        delays in prop::collection::vec(prop_oneof![Just(0.0), Just(1.0), 0.0..1.0], 1..40),
    ) {
        let Some(fleet) = fleet(limit, share, &replicas) else { return Ok(()) };
        let received = fleet.run(&delays);
        prop_assert_eq!(refused(&received, limit), 0, "{:?} share {}", limit, share);
    }

    /// Without the fleet's turns, as while the database is away, a replica that is alone still keeps to a low limit.
    #[test]
    fn a_lone_replica_keeps_to_a_low_limit_without_turns(
        max in 1_u32..20,
        share in prop_oneof![Just(0.8), Just(1.0), 0.05..1.0],
        load in load(),
        delays in prop::collection::vec(prop_oneof![Just(0.0), Just(1.0), 0.0..1.0], 1..40),
    ) {
        let limit = DocumentedLimit { max, window: Duration::from_secs(1) };
        let Some(mut fleet) = fleet(limit, share, &[load]) else { return Ok(()) };
        fleet.allowance.between_turns = None;
        prop_assert_eq!(refused(&fleet.run(&delays), limit), 0, "{:?} share {}", limit, share);
    }
}

#[test]
fn the_property_notices_a_limit_that_is_exceeded() {
    let limit = DocumentedLimit { max: 1, window: Duration::from_secs(1) };
    let crowd = vec![(vec![(0.0, 5)], Vec::new()); 2];
    let mut fleet = fleet(limit, 1.0, &crowd).unwrap();
    fleet.allowance.between_turns = None;
    assert!(refused(&fleet.run(&[0.0]), limit) > 0, "two replicas without turns send at the same moment");
}
