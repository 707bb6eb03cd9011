//! HTTP beside gRPC, on a port of its own: the API of `api` under `/v1`, health, the page at `/`, and the same gRPC services for
//! browsers (gRPC-web).
//!
//! [`listen`] accepts connections, for the gRPC port too. It knows nothing of tensors, and nothing of decoding but what the service
//! tells.

pub(crate) mod api;
pub mod listen;
mod page;
mod together;

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::json;
use tonic_web::GrpcWebLayer;
use tower::{Layer, Service, ServiceExt};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::service::access::{Door, admit};
use crate::service::boundary::Boundary;
use crate::service::lifecycle::Health;
use crate::service::registry::Registry;
use crate::service::{ServeOptions, proto};

/// What browsers may see of a gRPC-web answer beside its body.
const EXPOSED: [HeaderName; 5] = [
    HeaderName::from_static("grpc-status"),
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-status-details-bin"),
    HeaderName::from_static("x-request-id"),
    header::RETRY_AFTER,
];

/// What the HTTP port serves, beside the gRPC services.
pub(crate) struct Context {
    pub registry: Arc<Registry>,
    pub boundary: Boundary,
    pub health: Health,
    pub options: ServeOptions,
}

impl Context {
    /// Everything on the port. `grpc` are the services that the gRPC port serves.
    pub fn router<S>(self, grpc: S) -> Router
    where
        S: Service<Request<tonic::body::Body>, Response = Response<tonic::body::Body>, Error = Infallible>,
        S: Clone + Send + Sync + 'static,
        S::Future: Send,
    {
        let Self { registry, boundary, health, options } = self;
        let door = Door { tokens: options.tokens.clone(), grpc: false };
        // Whoever speaks gRPC is told in gRPC, whatever the path.
        let grpc = Router::new().fallback_service(GrpcWebLayer::new().layer(grpc));
        let router = Router::new()
            .nest("/v1", api::router(registry, boundary, options.message_bytes_max))
            .route("/health", get(self::health).with_state(health))
            .route("/lacuna.v1.descriptors", get(descriptors))
            .merge(page::router())
            .fallback(async || api::Error::not_found())
            .method_not_allowed_fallback(async || api::Error::method_not_allowed())
            .layer(middleware::from_fn_with_state(grpc, by_content_type))
            .layer(middleware::from_fn_with_state(door, admit));
        let origins = &options.http_origins;
        if origins.is_empty() { router } else { router.layer(cors(origins)) }
    }
}

/// gRPC and gRPC-web to the gRPC services, everything else to its route.
async fn by_content_type(State(grpc): State<Router>, request: Request, next: Next) -> Response {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    if content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc")) {
        let Ok(response) = grpc.oneshot(request).await;
        return response;
    }
    next.run(request).await
}

fn cors(origins: &[HeaderValue]) -> CorsLayer {
    let any = origins.iter().any(|origin| origin == "*");
    let origins = if any { AllowOrigin::any() } else { AllowOrigin::list(origins.iter().cloned()) };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([http::Method::GET, http::Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(EXPOSED)
}

/// Whether the models are warm and the server takes requests.
async fn health(State(health): State<Health>) -> Response {
    let (status, word) =
        if health.serving() { (StatusCode::OK, "serving") } else { (StatusCode::SERVICE_UNAVAILABLE, "not serving") };
    (status, [(header::CACHE_CONTROL, "no-store")], Json(json!({"status": word}))).into_response()
}

/// The published API as a file descriptor set, for clients that read messages by it.
async fn descriptors() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/octet-stream")], Body::from(proto::DESCRIPTORS))
}
