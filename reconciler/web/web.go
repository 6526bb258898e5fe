// Package web is the page for people: the fleet as it is, live. It is three hand-written files that ask package api's
// endpoints, listen to /api/v1/watch (server-sent events), and need nothing from anywhere else.
package web

import (
	"bytes"
	"embed"
	"fmt"
	"net/http"
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
)

//go:embed page
var page embed.FS

// policy lets the page run its own script and style and speak to its own server, and nothing else: names that come
// from machines cannot become code even where the page had a mistake.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// Handler serves the page at / and at /hosts/{host}, and its files under /assets/. It is to be mounted at /.
func Handler() http.Handler {
	mux := http.NewServeMux()
	index := file("index.html", "text/html; charset=utf-8")
	mux.Handle("GET /{$}", index)
	mux.Handle("GET /hosts/{host}", index)
	mux.Handle("GET /assets/app.js", file("app.js", "text/javascript; charset=utf-8"))
	mux.Handle("GET /assets/app.css", file("app.css", "text/css; charset=utf-8"))
	mux.Handle("GET /favicon.ico", file("icon.svg", "image/svg+xml"))
	mux.Handle("GET /assets/icon.svg", file("icon.svg", "image/svg+xml"))
	return mux
}

// file serves one embedded file; browsers ask each time whether they have the newest.
func file(name, contentType string) http.Handler {
	body, err := page.ReadFile("page/" + name)
	if err != nil {
		panic(fmt.Sprintf("the page has no file %s: %v", name, err)) // a mistake of the build: a test serves them all
	}
	tag := `"` + digest.Of(body).Short() + `"`
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Type", contentType)
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-cache")
		h.Set("ETag", tag)
		http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(body))
	})
}
