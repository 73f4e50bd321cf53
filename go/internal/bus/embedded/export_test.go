package embedded

// Clients is how many connections the server has, those of the process included.
func (s *Server) Clients() int { return s.current().NumClients() }
