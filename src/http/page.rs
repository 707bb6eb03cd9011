//! The page at `/`: files that are part of the binary.

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{HeaderMap, StatusCode, header};
use sha2::{Digest, Sha256};

/// The page's own files run, and nothing else does; it speaks to this server alone.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; frame-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// A generated page runs whatever it has, in an origin that is nobody's, and reaches no network. That it leads its frame elsewhere is
/// prevented by the `frame-src` of the page around it.
const FRAME_POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; \
     media-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SVG: &str = "image/svg+xml";
const SCRIPT: &str = "text/javascript; charset=utf-8";

struct File {
    path: &'static str,
    content_type: &'static str,
    content: &'static [u8],
    /// The content security policy.
    policy: &'static str,
}

const fn file(path: &'static str, content_type: &'static str, content: &'static [u8]) -> File {
    File { path, content_type, content, policy: POLICY }
}

const FILES: [File; 19] = [
    file("/", HTML, include_bytes!("page/index.html")),
    file("/style.css", CSS, include_bytes!("page/style.css")),
    file("/icon.svg", SVG, include_bytes!("page/icon.svg")),
    file("/main.js", SCRIPT, include_bytes!("page/main.js")),
    file("/canvas.js", SCRIPT, include_bytes!("page/canvas.js")),
    file("/connection.js", SCRIPT, include_bytes!("page/connection.js")),
    file("/examples.js", SCRIPT, include_bytes!("page/examples.js")),
    file("/figures.js", SCRIPT, include_bytes!("page/figures.js")),
    file("/grpc.js", SCRIPT, include_bytes!("page/grpc.js")),
    file("/lane.js", SCRIPT, include_bytes!("page/lane.js")),
    file("/preview.js", SCRIPT, include_bytes!("page/preview.js")),
    file("/prompt.js", SCRIPT, include_bytes!("page/prompt.js")),
    file("/protobuf.js", SCRIPT, include_bytes!("page/protobuf.js")),
    file("/replay.js", SCRIPT, include_bytes!("page/replay.js")),
    file("/settings.js", SCRIPT, include_bytes!("page/settings.js")),
    file("/share.js", SCRIPT, include_bytes!("page/share.js")),
    file("/theme.js", SCRIPT, include_bytes!("page/theme.js")),
    file("/view.js", SCRIPT, include_bytes!("page/view.js")),
    File { path: "/frame.html", content_type: HTML, content: include_bytes!("page/frame.html"), policy: FRAME_POLICY },
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
