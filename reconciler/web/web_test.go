package web_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/reconciler/web"
)

func TestHandler(t *testing.T) {
	for path, want := range map[string]struct {
		status int
		kind   string
	}{
		"/":                {200, "text/html"},
		"/hosts/n1":        {200, "text/html"},
		"/assets/app.js":   {200, "text/javascript"},
		"/assets/app.css":  {200, "text/css"},
		"/assets/icon.svg": {200, "image/svg+xml"},
		"/favicon.ico":     {200, "image/svg+xml"},
		"/hosts/":          {404, ""},
		"/assets/":         {404, ""},
		"/page/app.js":     {404, ""},
		"/nosuch":          {404, ""},
	} {
		w := httptest.NewRecorder()
		web.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		h := w.Result().Header
		if w.Code != want.status || !strings.HasPrefix(h.Get("Content-Type"), want.kind) {
			t.Errorf("GET %s: %d %s, want %d %s", path, w.Code, h.Get("Content-Type"), want.status, want.kind)
		}
		if w.Code == 200 && !strings.Contains(h.Get("Content-Security-Policy"), "default-src 'none'") {
			t.Errorf("GET %s: no policy", path)
		}
	}
}

func TestNotModified(t *testing.T) {
	w := httptest.NewRecorder()
	web.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/assets/app.js", nil))
	r := httptest.NewRequest(http.MethodGet, "/assets/app.js", nil)
	r.Header.Set("If-None-Match", w.Result().Header.Get("ETag"))
	w = httptest.NewRecorder()
	web.Handler().ServeHTTP(w, r)
	if w.Code != http.StatusNotModified {
		t.Errorf("a file that the browser has: %d", w.Code)
	}
}
