#include "server/http/http_server.h"

#include <sys/socket.h>

#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "httplib.h"

namespace coppice {
namespace {

// Two scrapers and a probe at a time.
constexpr int kWorkers = 3;

class HttplibServer final : public HttpServer {
 public:
  explicit HttplibServer(Options options) : options_(std::move(options)) {
    server_.new_task_queue = [] { return new httplib::ThreadPool(kWorkers); };
    // httplib's default is SO_REUSEPORT, under which a second daemon would silently share the port.
    server_.set_socket_options([](socket_t socket) {
      const int yes = 1;
      setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    });
    server_.set_keep_alive_timeout(1);
    server_.set_read_timeout(5);
    server_.set_payload_max_length(0);
    AddRoutes();
  }

  ~HttplibServer() override {
    if (!thread_.joinable()) return;
    while (!server_.is_running()) std::this_thread::yield();  // stop() before that is lost
    server_.stop();
    thread_.join();
  }

  absl::Status Listen() {
    if (options_.port == 0) {
      port_ = server_.bind_to_any_port(options_.host);
    } else if (server_.bind_to_port(options_.host, options_.port)) {
      port_ = options_.port;
    }
    if (port_ <= 0) {
      return absl::UnavailableError(absl::StrCat("http server did not start: want to listen on ",
                                                 options_.host, ":", options_.port,
                                                 ", got port taken or no such address; stop the "
                                                 "other process or change --http_port or --host"));
    }
    thread_ = std::thread([this] { server_.listen_after_bind(); });
    return absl::OkStatus();
  }

  int port() const override { return port_; }

 private:
  void AddRoutes() {
    server_.Get("/metrics", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(options_.metrics(), "text/plain; version=0.0.4; charset=utf-8");
    });
    server_.Get("/healthz", [this](const httplib::Request&, httplib::Response& response) {
      const bool healthy = options_.healthy();
      if (!healthy) response.status = 503;
      response.set_content(healthy ? "ok\n" : "failed\n", "text/plain");
    });
    server_.Get("/readyz", [this](const httplib::Request&, httplib::Response& response) {
      const std::string reason = options_.not_ready_reason();
      if (!reason.empty()) response.status = 503;
      response.set_content(reason.empty() ? "ready\n" : reason + "\n", "text/plain");
    });
  }

  Options options_;
  httplib::Server server_;
  std::thread thread_;
  int port_ = -1;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(Options options) {
  auto server = std::make_unique<HttplibServer>(std::move(options));
  const absl::Status status = server->Listen();
  if (!status.ok()) return status;
  return server;
}

}  // namespace coppice
