// Package api is the server's HTTP+JSON interface: for operators under /api/v1/ (openapi.json describes it), for agents
// under /node/v1/ (package agentapi describes it), and the client for the former.
//
// What operators get are views: stable types, joined from the records of package state by functions without I/O. The
// API decides nothing and writes no record: it asks the controllers.
package api
