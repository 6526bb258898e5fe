package api

import (
	_ "embed"
	"net/http"
)

// openapi describes what operators can ask, for programs in other languages. A test holds it against the routes and
// the types.
//
//go:embed openapi.json
var openapi []byte

func (s *Server) getOpenAPI(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(openapi) // there is nobody to tell that the client is gone
	return nil
}
