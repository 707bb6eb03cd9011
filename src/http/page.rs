//! The page at `/`: files that are part of the binary.

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{HeaderMap, StatusCode, header};
use sha2::{Digest, Sha256};

/// The page's own files run, and nothing else does; it speaks to this server alone.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
     frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

struct File {
    path: &'static str,
    content_type: &'static str,
    content: &'static [u8],
    /// The content security policy.
    policy: &'static str,
}

const FILES: [File; 3] = [
    File { path: "/", content_type: "text/html; charset=utf-8", content: include_bytes!("page/index.html"), policy: POLICY },
    File {
        path: "/app.js",
        content_type: "text/javascript; charset=utf-8",
        content: include_bytes!("page/app.js"),
        policy: POLICY,
    },
    File {
        path: "/style.css",
        content_type: "text/css; charset=utf-8",
        content: include_bytes!("page/style.css"),
        policy: POLICY,
    },
];

pub fn router() -> Router {
    FILES.iter().fold(Router::new(), |router, file| {
        let tag = format!("\"{:.32}\"", hex(&Sha256::digest(file.content)));
        router.route(file.path, get(move |headers: HeaderMap| async move { serve(file, &tag, &headers) }))
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn serve(file: &File, tag: &str, request: &HeaderMap) -> Response {
    // Asked again each time, answered with nothing new: a page never outlives the server that it was made for.
    let headers = [
        (header::ETAG, tag),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, file.policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    let known = request.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    if known.is_some_and(|known| known.split(',').any(|known| [tag, "*"].contains(&known.trim().trim_start_matches("W/")))) {
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    (headers, [(header::CONTENT_TYPE, file.content_type)], file.content).into_response()
}
