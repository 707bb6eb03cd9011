//! What is drafted, by what has been seen and timed.

use super::*;

const LIMIT: Shape = Shape { width: 3, length: 6 };

fn costs(slope: f64) -> Arc<Costs> {
    let verify = vec![(1, 1.0), (2, 1.0 + slope), (16, 1.0 + 15.0 * slope)];
    let shapes = (1..=3).flat_map(|width| (1..=6).map(move |length| Shape { width, length }));
    let draft = |shape: Shape| DraftCost { shape, candidates: shape.width * shape.length, seconds: 0.05 * shape.length as f64 };
    Arc::new(Costs { verify, draft: shapes.map(draft).collect() })
}

/// One that has taken its plain steps.
fn settled(slope: f64) -> Adaptation {
    let mut adaptation = Adaptation::new(costs(slope), LIMIT, 0.75);
    (0..PLAIN_FIRST).for_each(|_| adaptation.timed(1, 1.0));
    adaptation
}

fn chain(length: u32) -> Tree {
    let tokens: Vec<u32> = (1..=length).collect();
    Tree::from_beams(0, [tokens.as_slice()])
}

#[test]
fn costs_run_on_straight_lines() {
    let costs = costs(0.1);
    for (nodes, cost) in [(1.0, 1.0), (2.0, 1.1), (9.0, 1.8), (16.0, 2.5), (30.0, 3.9)] {
        assert!((costs.verify(nodes) - cost).abs() < 1e-9, "{nodes}: {}", costs.verify(nodes));
    }
}

#[test]
fn drafts_grow_with_acceptance_and_end_without_it() {
    let mut adaptation = settled(0.02);
    for _ in 0..40 {
        let tree = chain(6);
        adaptation.observe(&tree, &[0, 1, 2, 3, 4, 5, 6], LIMIT);
    }
    assert_eq!(adaptation.choose(LIMIT).map(|shape| shape.length), Some(6));
    assert_eq!(adaptation.fresh().choose(LIMIT).map(|shape| shape.length), Some(FIRST), "another text may be unknown");
    // Wider drafts were never tried and fail too, once they are.
    let beams: Vec<Vec<u32>> = (1..=3).map(|first| vec![first; 6]).collect();
    let mut drafts = 0;
    for _ in 0..400 {
        if let Some(shape) = adaptation.choose(LIMIT) {
            drafts += 1;
            let beams = beams[..shape.width].iter().map(|beam| &beam[..shape.length]);
            adaptation.observe(&Tree::from_beams(0, beams), &[0], shape);
        }
    }
    assert!(drafts <= 12, "{drafts} drafts in 400 steps though none is ever right");
}

#[test]
fn costs_follow_what_is_timed() {
    let mut adaptation = settled(0.02);
    assert!(adaptation.choose(LIMIT).is_some());
    for _ in 0..60 {
        adaptation.timed(4, 4.0);
    }
    assert!(adaptation.choose(LIMIT).is_none_or(|shape| shape == LOOK), "at most it looks");
    assert_eq!(adaptation.choose(LIMIT), None, "three further tokens now cost three plain steps");
    for _ in 0..60 {
        adaptation.timed(1, 1.0);
        adaptation.timed(4, 1.1);
    }
    assert!(adaptation.choose(LIMIT).is_some());
    for _ in 0..PLAIN_EVERY {
        adaptation.timed(4, 1.1);
    }
    assert_eq!(adaptation.choose(LIMIT), None, "it is time to see what a plain step costs");
}

/// A first draft of one token, which brings little by itself, is where longer ones begin.
#[test]
fn short_first_drafts_need_not_pay_by_themselves() {
    let mut adaptation = Adaptation::new(costs(0.0), LIMIT, 0.9);
    (0..PLAIN_FIRST).for_each(|_| adaptation.timed(1, 1.0));
    // Whatever its size, a verifying forward takes as long as two plain ones.
    (0..100).for_each(|_| adaptation.timed(4, 2.0));
    adaptation.timed(1, 1.0);
    assert_eq!(adaptation.choose(LIMIT), Some(Shape { width: 1, length: 1 }));
}

#[test]
fn after_a_wrong_draft_a_text_waits_longer_where_none_was_right() {
    let short = Shape { width: 1, length: 1 };
    let waits = |right: bool| {
        let mut adaptation = settled(0.02);
        if right {
            adaptation.observe(&chain(1), &[0, 1], short);
        }
        adaptation.observe(&chain(1), &[0], short);
        (0..100).take_while(|_| adaptation.choose(LIMIT).is_none()).count()
    };
    assert_eq!((waits(true), waits(false)), WRONG_PAUSE);
}

/// Short drafts that are always right say nothing against longer ones.
#[test]
fn what_was_not_asked_is_not_held_against_a_drafter() {
    let mut adaptation = settled(0.3);
    for turn in 0..60 {
        match turn % 3 {
            0 => adaptation.observe(&chain(2), &[0], Shape { width: 1, length: 2 }),
            _ => adaptation.observe(&chain(2), &[0, 1, 2], Shape { width: 1, length: 2 }),
        }
    }
    let [first, second, third] = adaptation.survival[0][..3] else { unreachable!("drafts have up to six tokens") };
    assert!((0.5..0.8).contains(&first) && (first - second).abs() < 0.01, "{first} and {second}");
    assert!((third / second - 0.75).abs() < 1e-9, "{third} by {second}");
}

#[test]
fn dear_forwards_are_not_drafted_for() {
    let mut adaptation = settled(1.0);
    assert_eq!(adaptation.choose(LIMIT), None);
}

#[test]
fn width_pays_where_the_first_beam_is_often_wrong() {
    let mut adaptation = settled(0.005);
    let tree = Tree::from_beams(0, [[1, 2].as_slice(), &[3, 4]]);
    for _ in 0..30 {
        adaptation.observe(&tree, &[0, 3, 4], Shape { width: 2, length: 2 });
    }
    assert!(adaptation.choose(LIMIT).is_some_and(|shape| shape.width >= 2));
}

#[test]
fn however_short_drafts_may_be_it_looks_again() {
    let (mut adaptation, limit) = (settled(0.0), Shape { width: 1, length: 1 });
    (0..30).for_each(|_| adaptation.observe(&chain(1), &[0], limit));
    let drafts = (0..100).filter(|_| adaptation.choose(limit) == Some(limit)).count();
    assert!((1..=4).contains(&drafts), "{drafts} looks in 100 steps");
}

#[test]
fn a_place_in_the_forward_must_be_worth_its_cost() {
    let mut adaptation = settled(0.05);
    assert!(adaptation.choose(LIMIT).is_some());
    assert!((0.05..0.3).contains(&adaptation.least()), "{}", adaptation.least());
    // Drafts that stop where they are not sure, and are right that far, keep their length and cost no more than they have.
    for _ in 0..40 {
        adaptation.observe(&chain(2), &[0, 1, 2], LIMIT);
    }
    assert!(adaptation.choose(LIMIT).is_some_and(|shape| shape.length >= 2));
    assert_eq!(settled(2.0).least(), LEAST_MAX, "a dear place needs a sure token");
}

#[test]
fn a_drafter_that_is_never_sure_is_asked_less() {
    let mut adaptation = settled(0.02);
    let mut asked = 0;
    for _ in 0..90 {
        if let Some(shape) = adaptation.choose(LIMIT) {
            asked += 1;
            adaptation.nothing(shape);
        }
    }
    assert!((8..20).contains(&asked), "{asked} times in 90 steps");
    adaptation.observe(&chain(6), &[0, 1, 2, 3, 4, 5, 6], LIMIT);
    let asked = (0..40).filter(|_| adaptation.choose(LIMIT).is_some()).count();
    assert!(asked > 30, "it was sure again, but was asked {asked} times in 40 steps");
}

#[test]
fn no_shape_beyond_the_limit() {
    let mut adaptation = settled(0.0);
    let limit = Shape { width: 2, length: 3 };
    assert!(adaptation.choose(limit).is_some_and(|shape| shape.width <= 2 && shape.length <= 3));
}

/// A server that is never idle drafts as well, by the costs measured at load, and does not wait for ever to see a plain step alone.
#[test]
fn plain_steps_beside_others_count() {
    let mut adaptation = Adaptation::new(costs(0.02), LIMIT, 0.75);
    assert_eq!(adaptation.choose(LIMIT), None);
    (0..PLAIN_FIRST).for_each(|_| adaptation.plain_beside());
    assert!(adaptation.choose(LIMIT).is_some());
    (0..PLAIN_EVERY).for_each(|_| adaptation.timed(4, 1.1));
    assert_eq!(adaptation.choose(LIMIT), None);
    adaptation.plain_beside();
    assert!(adaptation.choose(LIMIT).is_some());
}
