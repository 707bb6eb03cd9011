//! Holes are filled, fixed text stays.

use lacuna::service::proto::template_piece::Piece;
use lacuna::service::proto::{GenerateRequest, Stopping, TemplatePiece, TokenIds};

use crate::harness::{PROMPT, generate, request, server};

fn piece(piece: Piece) -> TemplatePiece {
    TemplatePiece { piece: Some(piece) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_keeps_its_fixed_text() {
    let server = server().await;
    let template = vec![
        piece(Piece::Text("def add(".into())),
        piece(Piece::Hole(4)),
        piece(Piece::Text("):\n    return ".into())),
        piece(Piece::Hole(6)),
        piece(Piece::TokenIds(TokenIds { token_ids: vec![5, 6] })),
    ];
    let mut asked = GenerateRequest { template, ..request(PROMPT) };
    // End-of-text would cut the canvas short, and this is about all of it.
    asked.method = crate::harness::long(10).method;
    let done = generate(&mut server.client().await, asked).await.expect("it generates");
    let (before, after) = (&done.started.canvas, done.replayed());
    assert_eq!(before.iter().filter(|cell| cell.masked).count(), 10);
    for (at, cell) in before.iter().enumerate() {
        match cell.masked {
            true => assert!(after[at].is_some(), "cell {at} is still masked"),
            false => assert_eq!(after[at], Some(cell.token_id), "fixed cell {at} was altered"),
        }
    }
    assert!(done.text().starts_with("def add("), "{:?}", done.text());
    assert_eq!(done.finished.usage.expect("usage").generated_tokens, 10, "fixed text is not generated");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suffix_is_what_the_text_ends_with() {
    let server = server().await;
    let suffix = "\n    return total\n";
    let asked = GenerateRequest {
        suffix: Some(suffix.into()),
        stopping: Some(Stopping { max_new_tokens: Some(8), stop: vec![] }),
        method: crate::harness::long(8).method,
        ..request("def add(a, b):\n    total =")
    };
    let done = generate(&mut server.client().await, asked).await.expect("it generates");
    assert!(done.text().ends_with(suffix), "{:?}", done.text());
    assert_eq!(done.started.canvas.iter().take_while(|cell| cell.masked).count(), 8);
}
